"""Products with weights of 1 to 8 bits, for any number of activation bits (after ABQ-LLM, arXiv 2408.08554)."""

from pallas_kernels.arbitrary_bit_matmul.activation import ActivationCodes, quantize_activations
from pallas_kernels.arbitrary_bit_matmul.api import (
    BACKENDS,
    Choice,
    arbitrary_bit_matmul,
    choose,
    code_matmul,
    prefer,
    prepare,
    weight_spec,
)
from pallas_kernels.arbitrary_bit_matmul.layouts import BY_ROWS, LAYOUTS, Prepared
from pallas_kernels.arbitrary_bit_matmul.packing import pack_dense, unpack_dense
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec

__all__ = [
    "BACKENDS",
    "BY_ROWS",
    "LAYOUTS",
    "ActivationCodes",
    "Choice",
    "Prepared",
    "WeightSpec",
    "arbitrary_bit_matmul",
    "choose",
    "code_matmul",
    "pack_dense",
    "prefer",
    "prepare",
    "quantize_activations",
    "unpack_dense",
    "weight_spec",
]
