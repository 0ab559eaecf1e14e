"""The card of costs: programs hold what their plans say, and verdicts follow from the numbers."""

import pytest
from ml_collections import ConfigDict

from experiments import sampler_cost

TINY = dict(size=(4, 4), channels=2, patch=(2, 2), hidden_size=16, num_layers=1, num_heads=2, mlp_size=32)


def test_programs_hold_the_trunks_of_their_plans(tmp_path):
    config = ConfigDict(dict(model=TINY, batch=1, steps=4, computed=(2,), rounds=1, corrector_rounds=1))
    found = sampler_cost.measure(config)
    bodies = {label: counts[0] for label, counts in found["programs"].items()}
    assert list(bodies.values()) == [4, 4, 2, 1]
    card = sampler_cost.card(config, found)
    card.write(tmp_path)
    assert any("adds 0 dot or convolution instructions; bar 0 met" in line for line in card.departures)
    assert {row.metric for row in card.rows} >= {"time over n / T", "trunks in the program"}


@pytest.mark.parametrize("seconds, verdict", [(0.6, "met"), (0.7, "MISSED")])
def test_verdicts_follow_from_the_numbers(seconds, verdict):
    config = ConfigDict(dict(steps=4, computed=(2,)))
    labels = (sampler_cost.FULL, sampler_cost.CORRECTED, "2 of 4 steps")
    found = {
        "programs": dict(zip(labels, ([4, 9], [4, 9], [2, 5]), strict=True)),
        "times": dict(zip(labels, ([1.0] * 3, [1.03] * 3, [seconds] * 3), strict=True)),
    }
    overhead, share = (sampler_cost.verdicts(config, found)[i] for i in (1, 3))
    assert overhead.endswith("MISSED") and share.endswith(verdict)
