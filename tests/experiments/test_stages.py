"""Stages: done once, never mixed between settings, nothing left of a killed run."""

import json

import pytest

from experiments.stages import NAME, Stages, discard
from jaxcomp.io.files import CheckpointError


def open_stages(folder, bits=4, **options):
    lines = []
    stages = Stages(folder, {"config": {"bits": bits}, "seed": 0}, ("out", "report"), log=lines.append, **options)
    return stages, lines


def fail():
    raise AssertionError("ran again")


def test_a_finished_stage_is_not_run_again(tmp_path):
    stages, _ = open_stages(tmp_path / "run")
    assert stages.run("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    stages, lines = open_stages(tmp_path / "run")
    assert stages.run("a", fail) == {"x": [1, 2]}
    assert lines == ["a: done before"]


def test_a_stage_that_fails_is_not_recorded(tmp_path):
    stages, _ = open_stages(tmp_path)
    stages.run("a", lambda: 1)
    with pytest.raises(AssertionError):
        stages.run("b", fail)
    with pytest.raises(ValueError, match="JSON"):
        stages.run("c", lambda: float("nan"))
    assert list(json.loads((tmp_path / NAME).read_text())["stages"]) == ["a"]


def test_forgetting_drops_the_stage_and_all_after_it(tmp_path):
    stages, _ = open_stages(tmp_path)
    for name in "abc":
        stages.run(name, lambda: 1)
    stages.forget("b")
    stages.forget("never ran")
    stages, _ = open_stages(tmp_path)
    assert [stages.run(name, lambda: 2) for name in "abc"] == [1, 2, 2]


def test_an_unsound_result_and_all_after_it_run_again(tmp_path):
    stages, _ = open_stages(tmp_path)
    for name in "abc":
        stages.run(name, lambda: 1)
    assert stages.run("b", lambda: 2, sound=lambda result: result != 1) == 2
    assert [stages.run(name, lambda: 3) for name in "abc"] == [1, 2, 3]


def test_other_settings_are_refused_with_their_difference(tmp_path):
    open_stages(tmp_path)[0].run("a", lambda: 1)
    with pytest.raises(CheckpointError, match=r"config.bits 4 there and 3 here.*--overwrite"):
        open_stages(tmp_path, bits=3)
    assert open_stages(tmp_path)[0].run("a", fail) == 1


def test_overwrite_discards_results_and_outputs(tmp_path):
    open_stages(tmp_path)[0].run("a", lambda: 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    (tmp_path / "report").write_text("old")
    (tmp_path / "notes").write_text("the user's")
    assert open_stages(tmp_path, bits=3, overwrite=True)[0].run("a", lambda: 2) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", NAME]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new folder or one of this job"):
        open_stages(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_leftovers_of_a_killed_run_go(tmp_path):
    for name in ("out", ".out.123.tmp"):  # an output that no stage recorded, and a temporary
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    (tmp_path / f".{NAME}.7.tmp").write_text("{")
    open_stages(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_discard_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "absent"):
        discard(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
