"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), W4A16 in groups of 32.

python -m experiments.compress_lm --config=configs/lm/gptq_w4.py [--config.bits=3]

Expected on the embedded model: perplexity 23.04 -> 23.32 (paired ratio 1.012; round to nearest: 1.020), with
--config.bits=3 24.86 (1.079); 4.50 bits per weight with scales;
three quarters of a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.quantize import gptq


def steps(config, model):
    """The chain, in order: `{name: transform}`."""
    del model
    return {
        "gptq": gptq(
            config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            scale_dtype=config.scale_dtype,
            damp=config.damp,
            act_order=config.act_order,
            static_groups=config.static_groups,
            sequential=config.sequential,
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
            scale_dtype="float16",
            damp=0.01,  # share of the mean of diag(H) added to it
            act_order=False,
            static_groups=False,
            sequential=True,  # statistics block by block, from the compressed prefix
        )
    )
