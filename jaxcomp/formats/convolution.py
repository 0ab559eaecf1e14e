"""`conv_general_dilated` with a compressed kernel."""

from collections.abc import Callable

import quax
from jax import lax
from jax.typing import ArrayLike

from jaxcomp.core.leaf import materialise


def register_conv(leaf_type: type, rule: Callable) -> None:
    """Registers `rule(x, leaf, spec, conv, params) -> y` for convolutions with a compressed kernel.

    `spec` are the dimension numbers, `conv(x, dense kernel)` is the convolution itself, `params` are its parameters. A rule
    answers NotImplemented for what it does not cover; the kernel is then materialised.
    """

    @quax.register(lax.conv_general_dilated_p)
    def _(lhs: ArrayLike, rhs: leaf_type, *, dimension_numbers, **params):
        conv = lambda x, w: lax.conv_general_dilated_p.bind(x, w, dimension_numbers=dimension_numbers, **params)
        out = rule(lhs, rhs, dimension_numbers, conv, params)
        return conv(lhs, materialise(rhs, "conv_general_dilated")) if out is NotImplemented else out
