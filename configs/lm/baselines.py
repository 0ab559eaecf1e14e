"""RTN, GPTQ, AWQ, SmoothQuant and their combination side by side, from W8A8 to W2A16, with and without outliers.

python -m experiments.lm_baselines

Rebuilds experiments/results/lm_baselines.json and .md. With JAXCOMP_DATA set it scores WikiText-2, too.
Expected: GPTQ and AWQ below round to nearest at 4 and 3 bits; with outliers, W4A4 perplexity 1372 by round to nearest and 27
by SmoothQuant (full precision: 23). 18 minutes on two busy CPU cores.
"""

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.core.transform import chain
from jaxcomp.quantize import GEMMA, LINEAR, LLAMA, awq, gptq, rtn, smoothquant


def methods(model, scheme):
    """{name: transform} of the methods that apply to a weight-only or a weight-activation scheme."""
    pairs = GEMMA if model.traits.gemma else LLAMA
    options = dict(scheme)
    alpha = options.pop("alpha", None)
    if alpha is None:
        return {"RTN": rtn(**options), "GPTQ": gptq(**options), "AWQ": awq(**options, pairs=pairs + LINEAR)}
    return {
        "RTN": rtn(**options),
        "GPTQ": gptq(**options),
        "SmoothQuant": chain(smoothquant(alpha, pairs=pairs), rtn(**options)),
        "SmoothQuant + GPTQ": chain(smoothquant(alpha, pairs=pairs), gptq(**options)),
    }


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    weight_only = dict(symmetric=False, scale_dtype="float16")
    both = dict(symmetric=True, scale_dtype="float16", group_size=0)
    return ConfigDict(
        job.settings()
        | dict(
            methods=methods,
            data_free=("RTN",),  # one seed is enough
            seeds=(0, 1, 2),  # draws of calibration windows
            outlier_channels=2,  # of the second model; the first has none
            evaluation_windows=128,
            schemes={
                "W8A8": both | dict(bits=8, act_bits=8, alpha=0.85),
                "W6A6": both | dict(bits=6, act_bits=6, alpha=0.5),
                "W4A4": both | dict(bits=4, act_bits=4, alpha=0.5),
                "W4A16": weight_only | dict(bits=4, group_size=0),
                "W3A16": weight_only | dict(bits=3, group_size=0),
                "W2A16": weight_only | dict(bits=2, group_size=0),
                "W3A16 g64": weight_only | dict(bits=3, group_size=64),
                "W2A16 g64": weight_only | dict(bits=2, group_size=64),
            },
        )
    )
