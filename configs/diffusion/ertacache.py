"""ERTACache beside uniform reuse, fewer steps, FORA, TeaCache, MagCache and TaylorSeer on the digits that ship with the package.

python -m experiments.ertacache

Rebuilds experiments/results/ertacache.json and .md. "ERTACache: Error Rectification and Timesteps Adjustment for Efficient
Diffusion", ICLR 2026, arXiv 2508.21091. 15 minutes on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    return ConfigDict(
        dict(
            model="",  # folder of a model that experiments.train_dit exported; "" is the one of the package
            steps=30,
            shift=3.0,
            guidance=1.5,
            computed=(15, 10),
            seeds=(0, 1, 2),  # of calibration and evaluation noises and classes
            calibration=64,
            evaluation=128,
            window=8,
            modes=("trunk", "out", "out_res"),
            lambda_factors=(0.8, 1.0, 1.2),
            small_calibration=20,
            timing_batch=64,
            timing_rounds=11,
        )
    )
