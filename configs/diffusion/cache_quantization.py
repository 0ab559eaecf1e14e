"""Caches x quantization x correctors on the shipped flow-matching digits.

python -m experiments.cache_quantization

Rebuilds experiments/results/cache_quantization_matrix.json and .md.
"""

from ml_collections import ConfigDict

STEPS = 30


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    full = dict(
        objective="flow",
        steps=STEPS,
        guidance=1.5,
        bits=16,  # unchanged
        act_bits=16,
        group_size=24,
        rank=0,
        smooth=True,  # of SVDQuant, where rank is not 0
    )
    return ConfigDict(
        dict(
            seeds=(1, 2, 3),  # of noises; on those of seed 0 the ridge of ls2 was chosen
            calibration=128,
            evaluation=128,
            steps=STEPS,
            computed=15,
            caches=("no cache", "uniform", "FORA", "ERTACache plan"),
            precisions={  # changes to the first one
                "FP32": full,
                "W8A8": dict(bits=8, act_bits=8),
                "W4A4": dict(bits=4, act_bits=4),
                "W4A4 rank 6": dict(bits=4, act_bits=4, rank=6),
                "W3A4": dict(bits=3, act_bits=4),
            },
            timed_precision="W4A4",
            timing_batch=32,
            timing_rounds=11,
            departures=(
                "PSNR and relative error are those to the full-precision sample of the same noise, all steps computed; 8 x 8 "
                "images are too small for SSIM's window of 11 pixels",
                "ERTACache enters with its plan and its rectifier, fitted in full precision; its adjusted time steps would put "
                "the states on another grid than the reference that ls2 is fitted to",
            ),
        )
    )
