"""MotionCache (arXiv 2605.01725) beside FlowCache, TeaCache, uniform reuse, random and oracle tokens, at equal compute.

python -m experiments.motioncache

Rebuilds experiments/results/motioncache.json, .md and .png. Expected: on the field with an exact denoiser the x0 estimate with
alpha 0.6 is ahead of FlowCache by more than 3, 1 and 1.5 dB at half, 35 % and a quarter of the tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    return ConfigDict(
        dict(
            seeds=(0, 1, 2, 3),
            budgets=(0.5, 0.35, 0.25),  # largest share of the tokens that may be computed
            floors=(0.6, 0.3, 0.1),  # alpha of MotionCache with the x0 estimate
            phases=((4, 3), (0, 3)),  # last full step and chunk-wise steps after it, beside (4, 0)
            control_floors=(0.6,),  # alpha of random, latent and oracle tokens
            threshold_range=(0.02, 1.2),  # thresholds as shares of the sum of all distances
            threshold_count=24,
            reuses=dict(field=("output",), video=("output",)),  # also "residual", "displacement"
            field=dict(
                videos=12,
                frames=4,
                tokens=32,
                channels=4,
                dynamic=0.25,
                steps=30,
                shift=3.0,
                shares=tuple(k / 16 for k in range(1, 16)),
                span=6.0,
            ),
            video=dict(
                seeds=(0, 1, 2),
                videos=6,
                given=1,
                chunks=3,
                steps=24,
                stagger=8,
                shift=3.0,
                shares=(0.125, 0.25, 0.375, 0.5, 0.75),
                threshold_count=10,
            ),
            speed=dict(width=256, depth=4, heads=4, size=64, patch=4, frames=4, rounds=7, steps=12, run_rounds=3),
        )
    )
