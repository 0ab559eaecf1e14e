"""Why Pallas Mosaic GPU does not run this operation, as a back end that keeps the reason.

Its copies by index (`x.at[indices]` through the tensor memory accelerator) exist on Blackwell alone; on Hopper and Ampere a copy
needs contiguous rows, so that the listed keys would have to be gathered to memory first: the bytes that early stops save.
"""

from __future__ import annotations

from pallas_kernels.sparse_attention.spec import Backend, Inputs, Outputs, Spec


def attend(x: Inputs, spec: Spec) -> Outputs:
    """Raises NotImplementedError."""
    raise NotImplementedError(refuse(spec, x))


def refuse(spec: Spec, x: Inputs) -> str:
    """The reason."""
    del spec, x
    return "Mosaic GPU copies rows by index on Blackwell only; elsewhere Triton loads them by pointers: use 'triton'"


BACKEND = Backend("mosaic_gpu", refuse, attend)
