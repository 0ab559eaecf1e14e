"""Round to nearest (the baseline of every paper on quantization), W4A16 in groups of 32.

python -m experiments.compress_lm --config=configs/lm/rtn_w4.py

Expected on the embedded model: perplexity 23.04 -> 23.49 (paired ratio 1.020), 4.50 bits per weight with scales;
three quarters of a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.quantize import rtn


def steps(config, model):
    """The chain, in order: `{name: transform}`."""
    del model
    return {
        "rtn": rtn(
            config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            act_bits=config.act_bits,
            scale_dtype=config.scale_dtype,
        )
    }


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        job.settings()
        | dict(
            steps=steps,
            bits=4,
            group_size=32,  # 0: one scale per output channel
            symmetric=True,
            act_bits=16,  # 16: activations stay in floating point
            scale_dtype="float16",
        )
    )
