"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438), W8A8: weights per output channel, activations per token.

python -m experiments.compress_lm --config=configs/lm/smoothquant_w8a8.py [--config.outlier_channels=2]

Expected on the embedded model: perplexity 23.04 -> 23.06 (paired ratio 1.0009), the same with
--config.outlier_channels=2, where round to nearest gives 23.39; 8.10 bits per weight with scales;
three quarters of a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.quantize import GEMMA, LLAMA, rtn, smoothquant


def steps(config, model):
    """The chain, in order: `{name: transform}`."""
    return {
        "smooth": smoothquant(config.alpha, pairs=GEMMA if model.traits.gemma else LLAMA),
        "round": rtn(
            config.bits, group_size=config.group_size, act_bits=config.act_bits, scale_dtype=config.scale_dtype
        ),
    }


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        job.settings()
        | dict(
            steps=steps,
            alpha=0.85,  # the authors' choice for Llama; 0.5 for OPT
            bits=8,
            act_bits=8,
            group_size=0,
            scale_dtype="float16",
        )
    )
