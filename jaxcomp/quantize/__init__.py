"""Quantizers as transforms."""

from jaxcomp.quantize.awq import awq, awq_clip, awq_scale
from jaxcomp.quantize.gptq import gptq
from jaxcomp.quantize.pairs import GEMMA, LINEAR, LLAMA, Pair
from jaxcomp.quantize.rtn import rtn
from jaxcomp.quantize.scheme import Scheme
from jaxcomp.quantize.smoothquant import smoothquant

__all__ = ["GEMMA", "LINEAR", "LLAMA", "Pair", "Scheme", "awq", "awq_clip", "awq_scale", "gptq", "rtn", "smoothquant"]
