"""The form of every convolution that is fastest on a CPU."""

from __future__ import annotations

from typing import Any

from jaxcomp.core.leaf import is_compressed, map_leaves
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.formats.conv_form import ConvFormArray
from pallas_kernels.convolution import is_built


def cpu_convolutions(native: bool | None = None) -> Transform:
    """Marks dense kernels [h, w, I, O] with the form of `jaxcomp.formats.conv_form` in which a CPU runs them fastest.

    XLA's CPU convolution is slow for depthwise kernels, for channels that are no multiples of its vectors, and in bfloat16.
    The result differs by the order of sums only. Kernels with one input channel are taken as depthwise; compressed leaves stay
    as they are. Comes last in a chain: no other transform touches its leaves.

    Args:
      native: whether dense convolutions run as C++ calls; None if `pallas_kernels.convolution` has been built. Their
        gradients, and machines other than CPUs, run the library's convolution. See `fuse_convolutions` for what surrounds them.
    """

    def update(params: Any, stats: Any) -> Any:
        del stats
        dense = "native" if (is_built() if native is None else native) else "aligned"

        def mark(path: str, leaf: Any) -> Any:
            if is_compressed(leaf) or len(leaf.shape) != 4 or path.split("/")[-1] != "kernel":
                return leaf
            return ConvFormArray(leaf, "shifted" if leaf.shape[2] == 1 < leaf.shape[3] else dense)

        return map_leaves(mark, params)

    return stateless(update)
