"""Result cards: validated, written atomically, rendered from their JSON."""

import dataclasses
import json
import os

import pytest

from experiments.cards import Card, Row, command_line, current_commit, current_device, main

ROWS = (
    Row("float", "W4A16", "perplexity", "", 50.0, 48.0, 52.0),
    Row("rtn", "W4A16", "perplexity", "", 55.0, 53.5, 57.25, paper=50.0, note="Paper: LLaMA-2-7B"),
    Row("rtn", "W4A16", "bits per weight", "bit", 4.5, 4.5, 4.5),
    Row("rtn|x", "W8A8", "perplexity", "", 12345.6, 12000.0, 13000.0),
)
CARD = Card("toy", "A paper (arXiv 0000.00000)", "python -m toy", "abc", "cpu", 1.25, [0, 1], ROWS, ["smaller model"])


def test_round_trip_and_schema():
    body = json.loads(CARD.to_json())
    assert list(body) == ["name", "paper", "command", "commit", "device", "minutes", "seeds", "rows", "departures"]
    assert list(body["rows"][0]) == ["method", "setting", "metric", "unit", "value", "low", "high", "paper", "note"]
    assert Card.from_json(CARD.to_json()) == CARD


def test_markdown_shows_interval_paper_and_gap():
    text = CARD.to_markdown()
    assert "| method | perplexity | bits per weight (bit) |" in text
    assert "| rtn | 55 [53.5, 57.25] (paper: 50, +10.0%) | 4.5 |" in text
    assert "| float | 50 [48, 52] |  |" in text
    assert "| rtn\\|x | 12,346 [12,000, 13,000] |" in text
    assert "- Paper: LLaMA-2-7B" in text and "- smaller model" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": float("nan")}, "expected finite numbers, found nan"),
        ({"value": "55"}, "expected finite numbers, found '55'"),
        ({"value": True}, "expected finite numbers, found True"),
        ({"paper": float("inf")}, "expected finite numbers, found inf"),
        ({"low": 56.0}, r"55.0 lies outside its interval \[56.0"),
        ({"metric": ""}, "must not be empty"),
    ],
)
def test_invalid_rows_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ROWS[1], **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../x"}, "lower-case letters"),
        ({"rows": ()}, "no rows"),
        ({"rows": (*ROWS, ROWS[0])}, "appears twice"),
    ],
)
def test_invalid_cards_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CARD, **change)


def test_unknown_and_missing_fields_are_refused():
    body = json.loads(CARD.to_json())
    with pytest.raises(ValueError, match="card: expected the fields"):
        Card.from_json(json.dumps(body | {"extra": 1}))
    del body["rows"][0]["unit"]
    with pytest.raises(ValueError, match="row: expected the fields"):
        Card.from_json(json.dumps(body))


def test_write_leaves_whole_files_only(tmp_path, monkeypatch):
    CARD.write(tmp_path / "results")
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["toy.json", "toy.md"]

    def fail(source, target):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        dataclasses.replace(CARD, minutes=9.0).write(tmp_path / "results")
    assert Card.from_json((tmp_path / "results" / "toy.json").read_text()) == CARD
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["toy.json", "toy.md"]


def test_markdown_is_rebuilt_from_json(tmp_path):
    CARD.write(tmp_path)
    (tmp_path / "toy.md").unlink()
    main([str(tmp_path / "toy.json")])
    assert (tmp_path / "toy.md").read_text() == CARD.to_markdown()


def test_commit_is_one_word():
    assert current_commit() and " " not in current_commit()


def test_command_names_no_folder_of_one_machine():
    arguments = ["--out=/a/b", "--workdir=/runs/x", "--seeds=0,1", "/data/pictures/", "relative/path"]
    expected = "python -m experiments.some --workdir=FOLDER/x --seeds=0,1 FOLDER/pictures relative/path"
    assert command_line("experiments.some", arguments) == expected


def test_device_names_the_device_and_the_cores_of_the_machine():
    assert current_device() == f"cpu, {os.cpu_count()} cores"
