"""ABQ-LLM (Zeng et al., AAAI 2025, arXiv 2408.08554), W2A8: learned clipping, rescaling and compensation, block by block.

python -m experiments.compress_lm --config=configs/lm/abq_w2a8.py [--config.bit_balance=True] [--config.learn_rounding=True]

Expected on the embedded model with two outlier channels per norm (factor 20), windows of 128 tokens, keys and values at 8 bits,
one seed: perplexity 23.8 -> 31.4 (round to nearest 54.4, OmniQuant 31.8), with learn_rounding 27.1; 2.26 bits per weight with
scales. Learning takes about a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.deploy import kernel_layouts
from jaxcomp.models import Llama
from jaxcomp.quantize import Rates, abq


def steps(config, model):
    """The chain, in order: `{name: transform}`."""
    rates = Rates(config.rate_let, config.rate_clip, config.rate_compensation, config.rate_rounding)
    layouts = {"layouts": kernel_layouts("cpu_ffi")} if config.bit_balance else {}  # five levels in 7/3 bits
    return {
        "abq": abq(
            config.bits,
            config.act_bits,
            model=Llama(model),
            kv_bits=config.kv_bits,
            bit_balance=config.bit_balance,
            epochs=config.epochs,
            batch_size=config.sequences_per_step,
            rates=rates,
            alpha=config.alpha,
            learn_rounding=config.learn_rounding,
            group_size=config.group_size,
            scale_dtype=config.scale_dtype,
        )
    } | layouts


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        job.settings()
        | dict(
            steps=steps,
            bits=2,
            act_bits=8,
            kv_bits=16,  # the job runs models whose keys and values stay in floating point; the paper's have act_bits
            bit_balance=False,  # True: W2*, five levels
            epochs=20,  # the authors: 40 at two bits, of 128 steps each
            sequences_per_step=2,  # the authors: 1
            rate_let=1.25e-2,  # the authors: 5e-3, 1e-2 and 1e-2 for eight times as many steps
            rate_clip=2.5e-2,
            rate_compensation=2.5e-2,
            rate_rounding=5e-3,
            learn_rounding=False,  # True: not in the paper, see `jaxcomp.quantize.abq`
            alpha=0.5,
            group_size=0,
            scale_dtype="float32",
            calibration_windows=32,
            context=128,
        )
    )
