"""ABQ-LLM (Zeng et al., AAAI 2025, arXiv 2408.08554) beside its baselines and without each of its ingredients.

python -m experiments.abq_llm

Rebuilds experiments/results/abq_llm.json and .md. With JAXCOMP_DATA set it scores WikiText-2, too.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.lm import job
from jaxcomp.core.transform import chain
from jaxcomp.models import Llama
from jaxcomp.quantize import (
    GEMMA,
    LINEAR,
    LLAMA,
    Objective,
    Rates,
    abq,
    affinequant,
    awq,
    gptq,
    omniquant,
    rtn,
    smoothquant,
)
from jaxcomp.quantize.learned import BLOCKS
from jaxcomp.quantize.let import NAMES

KV_METHODS = ("smoothquant", "abq")


def methods(config, model, scheme):
    """{name: transform} of the methods that are compared under a scheme, all with the same grids, data and budget."""
    grid = dict(rules=BLOCKS, symmetric=False, levels=scheme["levels"])
    bits, acts = scheme["bits"], scheme["act_bits"]
    plain = grid | dict(act_bits=acts, act_symmetric=False)
    learn = grid | budget(config, model, scheme)
    pairs = GEMMA if model.traits.gemma else LLAMA
    smooth = smoothquant(config.alpha, pairs=pairs)
    weights_only = {"awq": awq(bits, pairs=pairs + LINEAR, **grid)}
    both = {"smoothquant": chain(smooth, rtn(bits, **plain)), "smoothquant+gptq": chain(smooth, gptq(bits, **plain))}
    return {
        "rtn": rtn(bits, **plain),
        "gptq": gptq(bits, **plain),
        **(both if acts < 16 else weights_only),
        "omniquant": omniquant(bits, acts, **learn),
        "affinequant": affinequant(bits, acts, **learn),
        "abq": abq(bits, acts, **learn),
        "abq+rounding": abq(bits, acts, learn_rounding=True, **learn),
    }


def ablations(config, model, scheme):
    """{name: transform}: ABQ-LLM without one of its ingredients, or with one more, named by what it lacks or gains."""
    learn = budget(config, model, scheme) | dict(levels=scheme["levels"])
    make = lambda **options: abq(scheme["bits"], scheme["act_bits"], **learn | options)
    unclipped = dataclasses.replace(learn["rates"], clip=0.0)
    squared = Objective(mse_aug=0, cosine=0, cosine_aug=0, kl=0, kl_reverse=0)
    return {
        "abq-compensation": make(compensate=(0, 0)),
        **{f"abq-{name}": make(transforms=tuple(n for n in NAMES if n != name)) for name in NAMES},
        "abq-lwc": make(rates=unclipped, clip_init=30.0),  # sigmoid(30) is one
        "abq-kl": make(objective=Objective(kl=0, kl_reverse=0)),
        "abq-cosine": make(objective=Objective(cosine=0, cosine_aug=0)),
        "abq-aug": make(objective=Objective(mse_aug=0, cosine_aug=0)),
        "abq+double softmax": make(objective=Objective(double_softmax=True)),
        "omniquant+rounding": make(
            objective=squared, transforms=("qkv", "fc1", "out", "qkt"), compensate=(0, 0), learn_rounding=True
        ),
    }


def budget(config, model, scheme):
    """Options that all learned methods share."""
    return dict(
        model=Llama(model),
        kv_bits=scheme["kv_bits"],
        epochs=scheme["epochs"],
        batch_size=config.sequences_per_step,
        rates=Rates(config.rate_let, config.rate_clip, config.rate_compensation, config.rate_rounding),
        alpha=config.alpha,
    )


def budgeted(config, model, scheme, rules):
    """{name: transform} of the methods whose bits per kernel are chosen for a budget."""
    plain = dict(symmetric=False, act_bits=scheme["act_bits"], act_symmetric=False)
    return {
        "rtn": rtn(rules=rules, **plain),
        "abq+rounding": abq(
            scheme["bits"], scheme["act_bits"], rules=rules, learn_rounding=True, **budget(config, model, scheme)
        ),
    }


def get_config() -> ConfigDict:
    """Every setting of the experiment."""
    wa = lambda bits, act_bits, **more: dict(bits=bits, levels=0, act_bits=act_bits, kv_bits=act_bits, epochs=20) | more
    return ConfigDict(
        job.settings()
        | dict(
            methods=methods,
            ablations=ablations,
            budgeted=budgeted,
            budget=budget,
            seeds=(0, 1, 2),  # draws of outlier channels and calibration windows
            schemes={
                "W2A8": wa(2, 8),
                "W2*A8": wa(3, 8, levels=5),
                "W4A4": wa(4, 4),
                "W3A8": wa(3, 8),
                "W4A8": wa(4, 8, epochs=10),
                "W6A6": wa(6, 6, epochs=5),
                "W8A8": wa(8, 8, epochs=2),
                "W3A16": wa(3, 16, epochs=10),
                "W4A4 KV8": wa(4, 4, kv_bits=8, only=KV_METHODS),
                "W4A4 KV16": wa(4, 4, kv_bits=16, only=KV_METHODS),
                "mixed A8": wa(2, 8, budgets=(2.25, 2.5, 3.0)),
            },
            ablated=("W2*A8",),
            ablated_seeds=(0,),  # fifteen more runs each
            timed={"W8A8": "smoothquant", "W4A4": "abq+rounding", "W2*A8": "abq+rounding"},
            outlier_channels=2,
            outlier_factor=20.0,
            alpha=0.5,
            sequences_per_step=2,
            rate_let=1.25e-2,
            rate_clip=2.5e-2,
            rate_compensation=2.5e-2,
            rate_rounding=5e-3,
            calibration_windows=32,
            evaluation_windows=64,
            context=128,
        )
    )
