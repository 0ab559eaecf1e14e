"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978), W4A16, asymmetric, in groups of 32.

python -m experiments.compress_lm --config=configs/lm/awq_w4.py [--config.bits=3]

Expected on the embedded model: perplexity 23.04 -> 23.32 (paired ratio 1.012; symmetric round to nearest: 1.020), 4.75
bits per weight with scales and zero points;
three quarters of a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.quantize import GEMMA, LINEAR, LLAMA, awq_clip, awq_scale


def steps(config, model):
    """The chain, in order: `{name: transform}`; both halves make `jaxcomp.quantize.awq`."""
    grid = dict(group_size=config.group_size, symmetric=config.symmetric, scale_dtype=config.scale_dtype)
    pairs = (GEMMA if model.traits.gemma else LLAMA) + LINEAR
    return {"scale": awq_scale(config.bits, pairs=pairs, **grid), "clip": awq_clip(config.bits, **grid)}


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        job.settings()
        | dict(
            steps=steps,
            bits=4,
            group_size=32,  # the authors use 128; the embedded model's layers have 128 to 320 inputs
            symmetric=False,
            scale_dtype="float16",
        )
    )
