"""The speed card of sparse attention on tiny heads: its rows, and what it says of the bar."""

import numpy as np
import pytest

from experiments import sparse_attention_speed as speed
from pallas_kernels.sparse_attention.bench import Options
from pallas_kernels.sparse_attention.shapes import SHAPES


@pytest.fixture(scope="module")
def rows():
    sizes = dict(segment=64, block_q=64, block_k=32)
    options = Options(shape="tiny", densities=(0.6, 1.0), implementations=("xla",), rounds=2, **sizes)
    part = speed.measure("mixed:512", options)
    assert part["minutes"] > 0
    return speed.rows_of(part["rows"], SHAPES["tiny"].query_heads)


def test_a_part_has_times_ratios_densities_and_phases(rows):
    found = {(row.method, row.metric): row for row in rows}
    sparse, whole = "xla, target density 0.6", "xla, target density 1"
    assert {row.setting for row in rows} == {"mixed heads, 512 tokens"}
    assert found[sparse, "density"].value <= 0.6 < found[whole, "density"].value == pytest.approx(1)
    assert found[whole, "mse"].value < 1e-10 < found[sparse, "mse"].value
    assert all(("dense, " + peer, "time") in found for peer in ("chunked/256", "jax.nn"))
    assert all((f"xla, up to {phase}", "time") in found for phase in ("guide", "scores", "sort", "window", "lists"))
    ratio = found[sparse, "speedup over chunked/256"]
    assert ratio.low <= ratio.value <= ratio.high and ratio.note == speed.CLAIM
    assert ("dense, jax.nn", "speedup over chunked/256") not in found
    assert all(row.value > 0 and np.isfinite(row.value) for row in rows)


@pytest.mark.parametrize(
    ("speedup", "text"),
    [
        (
            {"chunked/256": 4.0, "chunked/1024": 3.5, "torch": 2.0},
            "3.50x the best dense attention in XLA (chunked/1024)",
        ),
        ({"chunked/256": 2.9, "torch": 2.0}, "is missed"),
        ({"chunked/256": 3.1, "torch": 0.9}, "is missed"),
        ({"chunked/256": 3.1}, "holds"),
    ],
)
def test_the_bar_is_judged_by_the_fastest_peer(speedup, text):
    row = dict(method="cpu_ffi", setting="0.16", kind="mixed", length=speed.LENGTH, density=0.15, speedup=speedup)
    (*_, verdict) = speed.departures([row])
    assert text in verdict
    dense = row | {"density": 0.5}
    assert len(speed.departures([dense])) == len(speed.departures([]))


def test_other_kinds_and_longer_sequences_run_at_the_first_density_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "results", lambda length, kind, options: seen.append(options.densities) or [])
    for part in ("mixed:16384", "mixed:32768", "stripe:4096"):
        speed.measure(part, Options())
    assert seen == [(0.16, 1.0), (0.16,), (0.16,)]


def test_the_share_of_planning_is_stated():
    phase = lambda setting, *seconds: dict(
        method="xla/phases", setting=setting, kind="mixed", length=64, seconds=seconds
    )
    (*_, text) = speed.departures([phase("sort", 1.0, 2.0, 1.0), phase("lists", 10.0, 10.0, 8.0)])
    assert text.endswith("mixed at 64 12%.")
