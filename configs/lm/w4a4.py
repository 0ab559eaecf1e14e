"""W4A4: SmoothQuant (arXiv 2211.10438), then GPTQ (arXiv 2210.17323); weights per output channel, activations per token.

python -m experiments.compress_lm --config=configs/lm/w4a4.py [--config.outlier_channels=2]

Expected on the embedded model: perplexity 23.04 -> 26.92 (paired ratio 1.169), the same with
--config.outlier_channels=2, where round to nearest collapses (lm_baselines); 4.10 bits per weight;
three quarters of a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.quantize import GEMMA, LLAMA, gptq, smoothquant


def steps(config, model):
    """The chain, in order: `{name: transform}`."""
    return {
        "smooth": smoothquant(config.alpha, pairs=GEMMA if model.traits.gemma else LLAMA),
        "gptq": gptq(
            config.bits,
            group_size=config.group_size,
            act_bits=config.act_bits,
            scale_dtype=config.scale_dtype,
            damp=config.damp,
        ),
    }


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        job.settings()
        | dict(
            steps=steps,
            alpha=0.5,
            bits=4,
            act_bits=4,
            group_size=0,
            scale_dtype="float16",
            damp=0.01,
        )
    )
