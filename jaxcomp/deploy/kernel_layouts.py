"""Quantized weights in the layouts that the kernels of a machine read."""

from __future__ import annotations

from typing import Any

from jaxcomp.core.leaf import map_leaves
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.formats import QuantizedArray, storage
from jaxcomp.formats.quantized_matmul import problem
from pallas_kernels.arbitrary_bit_matmul import BACKENDS, BY_ROWS, api


def kernel_layouts(implementation: str | None = None, rows: int = 1) -> Transform:
    """Stores the codes of quantized leaves as a kernel of `pallas_kernels.arbitrary_bit_matmul` reads them; values stay.

    The C++ kernel reads dense words, and five levels (W2* of ABQ-LLM, arXiv 2408.08554) in 7/3 bits instead of 3; XLA on CPU
    reads the words as bytes in about 0.6 of the time; kernels for TPU and GPU read tiles, and leaves in other layouts run in
    XLA there. Leaves that the kernel does not cover, and tables whose rows are looked up, stay as they are. Comes last in a
    chain.

    Args:
      implementation: a name of `pallas_kernels.arbitrary_bit_matmul.BACKENDS`; None is what this machine prefers for `rows`.
      rows: activation rows of the products that matter, 1 for decoding one sequence.

    Raises:
      ValueError: the implementation is unknown, or rows < 1.
    """
    names = api.platform_preference() if implementation is None else (implementation,)
    if unknown := set(names) - set(BACKENDS):
        raise ValueError(f"implementation {min(unknown)!r} is unknown; known are {', '.join(BACKENDS)}")
    if rows < 1:
        raise ValueError(f"rows must be positive, found {rows}")

    def lay_out(path: str, leaf: Any) -> Any:
        del path
        if not isinstance(leaf, QuantizedArray):
            return leaf
        spec, x, packed = problem(leaf.stored_as(storage.DENSE), rows)
        try:
            name = api.choose(spec, x, packed, names).name
        except ExceptionGroup:  # the named kernel does not cover it
            return leaf
        layout = BACKENDS[name].layouts(spec)[0]
        return leaf if leaf.is_table and layout not in BY_ROWS else leaf.stored_as(layout)

    return stateless(lambda params, stats: map_leaves(lay_out, params))
