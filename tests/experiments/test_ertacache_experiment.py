"""The ERTACache experiment: its card from recorded runs, and one small seed of it."""

import numpy as np
import pytest

from configs.diffusion import ertacache as settings
from experiments import ertacache as experiment
from experiments.ertacache_card import MAIN, RIVALS, card

TIMING = {"speedup": {"15": [1.9, 1.8, 2.0], "10": [1.5, 1.4, 1.6]}, "seconds": {}, "load": [0, 0], "elapsed": 1.0}


def recorded(level, mask, samples=6):
    noise = 0.1 * np.random.default_rng(0).standard_normal(samples)
    return {"psnr": (level + noise).tolist(), "relative_error": [0.01] * samples, "mask": mask}


@pytest.fixture
def seeds():
    """Runs in which ERTACache beats all but TeaCache, and MagCache has no plan with 10 steps."""
    levels = {MAIN: 45.0} | dict.fromkeys(RIVALS, 40.0) | {"TeaCache": 46.0, "20 calibration samples": 44.0}
    levels |= {f"lambda x {f:g}": 44.0 for f in (0.8, 1.0, 1.2)} | {"trunk: uniform": 40.0, "trunk: plan": 44.0}
    runs = {n: {m: recorded(v, "1" * int(n) + "0" * (30 - int(n))) for m, v in levels.items()} for n in ("15", "10")}
    del runs["10"]["MagCache"]
    return [{"runs": runs, "elapsed": 2.0}] * 3


def test_card_says_which_bars_are_met(seeds):
    made = card(settings.get_config(), seeds, TIMING, "a CPU")
    said = "\n".join(made.departures)
    assert "at 15 steps, ERTACache over uniform by at least 3 dB: met, +5.00 dB" in said
    assert "at 15 steps, ERTACache over TeaCache by at least 0 dB: missed, -1.00 dB" in said
    assert "MagCache has no plan with 10 computed steps" in said
    assert "at 15 steps, wall time at most 1.3 times n/T of the full sampler's: met, 1.05 times" in said
    assert "at 10 steps, wall time at most 1.3 times n/T of the full sampler's: missed, 2.00 times" in said
    rows = {(row.method, row.setting, row.metric): row for row in made.rows}
    assert rows["uniform", "15 of 30 steps computed", "gain of ERTACache in psnr"].value == pytest.approx(5)
    gained = rows["plan", "15 of 30 steps computed, mode trunk", "gain over uniform in psnr"]
    assert gained.value == pytest.approx(4) and gained.paper == pytest.approx(8.33)


@pytest.mark.slow
def test_one_small_seed_beats_uniform_reuse():
    config = settings.get_config()
    config.update(dict(computed=(15,), calibration=16, small_calibration=8, evaluation=16, modes=("trunk",)))
    found = experiment.run_seed(config, experiment.load(config), 0)["runs"]["15"]
    mean = lambda name: np.mean(found[name]["psnr"])
    assert mean(MAIN) > mean("uniform") + 2 and mean(MAIN) > mean("fewer steps")
    for name in (MAIN, "uniform", "FORA", "fewer steps", "erta-dp"):
        assert found[name]["mask"].count("1") == 15
