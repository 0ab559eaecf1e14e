"""Quantizers as transforms."""

from jaxcomp.quantize.abq import abq
from jaxcomp.quantize.affinequant import affinequant
from jaxcomp.quantize.attention import quantized_attention
from jaxcomp.quantize.awq import awq, awq_clip, awq_scale
from jaxcomp.quantize.gptq import gptq
from jaxcomp.quantize.losses import Objective
from jaxcomp.quantize.omniquant import omniquant
from jaxcomp.quantize.pairs import GEMMA, LINEAR, LLAMA, Pair
from jaxcomp.quantize.rtn import rtn
from jaxcomp.quantize.scheme import Scheme
from jaxcomp.quantize.smoothquant import smoothquant
from jaxcomp.quantize.student import Rates
from jaxcomp.quantize.svdquant import svdquant

__all__ = [
    "GEMMA",
    "LINEAR",
    "LLAMA",
    "Objective",
    "Pair",
    "Rates",
    "Scheme",
    "abq",
    "affinequant",
    "awq",
    "awq_clip",
    "awq_scale",
    "gptq",
    "omniquant",
    "quantized_attention",
    "rtn",
    "smoothquant",
    "svdquant",
]
