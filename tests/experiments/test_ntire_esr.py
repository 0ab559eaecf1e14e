"""The printed table of the challenge ranks itself as printed; the harness measures, ranks and writes its card."""

import json

import numpy as np
import pytest
from rich.console import Console

from experiments.cards import Card
from experiments.ntire_esr import DEPARTURES, entries, measure, published, quality_rows, rows, table_of_ranks
from jaxcomp.evaluate import challenge
from jaxcomp.evaluate.challenge import COSTS, Entry, rank
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import RLFN

TINY = {"RLFN": lambda: RLFN(8, 8, 1, 4), "RFDN": lambda: RFDN(8, 1), "IMDN": lambda: IMDN(16, 2)}


def entry(name, *costs, val=29.0, test=28.7, **order):
    return Entry(name, val, test, dict(zip(COSTS, costs, strict=True)), order)


def test_figures_give_the_printed_ranks_in_all_three_tracks_but_for_one_erratum():
    found, printed = rank(challenge.printed_entries()), challenge.printed_ranks()
    assert len(found) == 35 and list(found) == list(printed)
    differing = [
        (team, track, getattr(found[team], track), getattr(printed[team], track))
        for team in printed
        for track in ("main", "complexity", "overall")
        if getattr(found[team], track) != getattr(printed[team], track)
    ]
    assert differing == [("Alpan", "complexity", 9, 10)]  # its score 18 equals that of MegSR, printed as 9
    assert found["Alpan"].complexity_score == found["MegSR"].complexity_score == 18


def test_scores_are_those_printed():
    found, printed = rank(challenge.printed_entries()), challenge.printed_ranks()
    for team, ranks in printed.items():
        assert found[team][3:] == ranks[3:], team


def test_printed_ranks_decide_only_between_equal_figures():
    plain = [Entry(e.name, e.psnr_val, e.psnr_test, e.costs) for e in challenge.printed_entries()]
    for cost in ("time", "activations", "memory"):
        assert len({e.costs[cost] for e in plain}) == 35
    assert [len({e.costs[cost] for e in plain}) for cost in ("params", "flops")] == [31, 34]


def test_psnr_decides_who_takes_part():
    teams = [Entry(name, val, test, {}) for name, val, test in challenge.excluded()]
    assert len(teams) + len(challenge.printed_entries()) == 43
    assert not any(team.eligible for team in teams)
    assert all(team.eligible for team in challenge.printed_entries())
    assert list(rank([entry("good", 2, 2, 2, 2, 2), entry("blurred", 1, 1, 1, 1, 1, val=28.9)])) == ["good"]


def test_equal_sums_share_the_better_rank():
    found = rank([entry("a", 1, 1, 2, 1, 1), entry("b", 2, 2, 1, 2, 2), entry("c", 3, 3, 3, 3, 3)])
    assert [found[name].complexity for name in "abc"] == [1, 1, 3]
    assert [found[name].overall for name in "abc"] == [1, 2, 3] and found["a"].overall_score == 6
    tied = rank([entry("a", 1, 5, 1, 1, 1, params=2), entry("b", 2, 5, 2, 2, 2, params=1)])
    assert [tied[name].complexity_score for name in "ab"] == [3, 3]


def test_incomplete_entries_are_refused():
    with pytest.raises(ValueError, match=r"a: expected the costs \('time', .* found \('time',\)"):
        rank([Entry("a", 29.0, 29.0, {"time": 1.0})])
    with pytest.raises(ValueError, match="names must differ"):
        rank([entry("a", 1, 1, 1, 1, 1), entry("a", 2, 2, 2, 2, 2)])


def test_harness_measures_ranks_and_writes_a_card(tmp_path, capsys):
    measured = measure(TINY, 16, 2)
    found = {e.name: e for e in entries(measured)}
    ranks = rank(list(found.values()))
    assert set(ranks) == set(TINY) and all(set(e.costs) == set(COSTS) for e in found.values())
    fastest = min(TINY, key=lambda name: np.median(measured.times.seconds[name]))
    assert next(iter(ranks)) == fastest and ranks[fastest].main == 1
    assert found["IMDN"].costs["params"] == measured.complexity["IMDN"].params / 1e6
    pixels, parameters = 16 * 16 * 3 * 4, 4 * measured.complexity["RLFN"].params
    assert measured.memory["RLFN"] >= 17 * pixels + parameters  # image, 16 times as large a result, params
    card = Card("tiny", "paper", "command", "commit", "cpu", 0.1, [0], rows(measured, ranks, 16), DEPARTURES)
    card.write(tmp_path)
    body = json.loads((tmp_path / "tiny.json").read_text())
    assert len(body["rows"]) == 3 * 10 and not any(row["paper"] for row in body["rows"])
    assert {row["metric"] for row in body["rows"]} >= {
        "params_M",
        "flops_G",
        "activations_M",
        "runtime_ms",
        "memory_MB",
    }
    assert "rank_overall" in (tmp_path / "tiny.md").read_text()
    Console(width=80).print(table_of_ranks(ranks))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[4:7]] == list(ranks)


def test_published_figures_of_the_three_networks():
    found = {name: (e.costs["params"], e.costs["flops"], e.costs["activations"]) for name, e in published().items()}
    assert found == {"RLFN": (0.317, 19.7, 80.05), "RFDN": (0.433, 27.1, 112.03), "IMDN": (0.894, 58.53, 154.14)}
    assert all(e.eligible for e in published().values())


@pytest.mark.slow
def test_challenge_networks_on_set5(data_dir):
    found = {(row.method, row.metric): row for row in quality_rows(data_dir)}
    psnr = {method: row.value for (method, metric), row in found.items() if metric == "psnr_rgb"}
    assert psnr["bicubic"] + 3 < psnr["RLFN"] < psnr["RFDN"] < psnr["IMDN"]
    best = found["RLFN, paper's 6 blocks", "psnr_y"], found["RLFN, paper's 6 blocks", "ssim_y"]
    assert best[0].value == pytest.approx(32.24, abs=0.01) and best[1].value == pytest.approx(0.8952, abs=0.0002)
    assert (best[0].paper, best[1].paper) == (32.24, 0.8952)
