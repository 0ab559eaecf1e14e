"""What a skipped step and a corrector cost, on a DiT that computes rather than waits.

python -m experiments.sampler_cost

Rebuilds experiments/results/sampler_cost.json and .md; less than two minutes on an idle machine of two cores. Expected: programs
of n trunks, run in n / T of the time, up to 1.3 times that; a corrector without products, and less than 2 % of the time.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    return ConfigDict(
        dict(
            model=dict(
                size=(32, 32), channels=4, patch=(2, 2), hidden_size=256, num_layers=4, num_heads=4, mlp_size=1024
            ),
            batch=1,
            steps=12,
            computed=(6, 3),
            rounds=15,
            corrector_rounds=121,  # a difference of a few percent takes more
        )
    )
