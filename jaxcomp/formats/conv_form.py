"""`ConvFormArray`: a dense convolution kernel that is run in a form that suits a CPU, with the same result."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.core import tape
from jaxcomp.core.leaf import CompressedArray
from jaxcomp.formats.convolution import register_conv
from pallas_kernels.convolution import Window, convolution

Form = Literal["aligned", "native", "shifted"]
_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_INPUTS, _OUTPUTS = 4, 16  # multiples of channels at which XLA's CPU convolution runs without scalar remainders


class ConvFormArray(CompressedArray):
    """A kernel [h, w, I, O] of a Flax convolution, and how to run it; what a form does not cover runs as it is.

    Attributes:
      value: the kernel itself.
      form: "aligned" fills channels with zeros, inputs to a multiple of 4 and outputs of 16, and cuts the result, or is a
        matrix product where the window is one pixel; "native" is the C++ kernel of `pallas_kernels.convolution`; "shifted"
        runs a depthwise convolution as one multiply-add of the whole map per tap. The latter two on CPU only.
    """

    kind = "conv_form"
    value: jax.Array
    form: Form = eqx.field(static=True)
    name: str = eqx.field(static=True, default="")

    def __check_init__(self):
        if self.form not in _FORMS:
            raise ValueError(f"form: expected one of {', '.join(_FORMS)}, found {self.form!r}")

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype of the kernel."""
        return jax.core.ShapedArray(self.value.shape, self.value.dtype)

    def materialise(self) -> jax.Array:
        """The kernel."""
        return self.value

    def astype(self, dtype):
        """The same form of the kernel in another dtype."""
        return ConvFormArray(self.value.astype(dtype), self.form, self.name)

    def copy(self):
        """Leaves are immutable: the leaf itself."""
        return self


def aligned(x: Float[Array, "N H W I"], kernel: Float[Array, "h w I O"], run) -> Float[Array, "N y x O"]:
    """The convolution `run(x, kernel)` with zero channels around it."""
    inputs, outputs = (-size % multiple for size, multiple in zip(kernel.shape[2:], (_INPUTS, _OUTPUTS), strict=True))
    fill = lambda array, *sizes: jnp.pad(array, [(0, 0)] * (array.ndim - len(sizes)) + [(0, size) for size in sizes])
    return run(fill(x, inputs), fill(kernel, inputs, outputs))[..., : kernel.shape[3]]


def shifted(x: Float[Array, "N H W C"], kernel: Float[Array, "h w 1 C"], padding, dilation) -> Float[Array, "N y x C"]:
    """Depthwise convolution of stride 1 as a sum over taps of shifted maps times a weight per channel."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (h, w), (down, right) = kernel.shape[:2], dilation
    height, width = x.shape[1] - down * (h - 1), x.shape[2] - right * (w - 1)
    window = lambda i, j: x[:, i * down : i * down + height, j * right : j * right + width]
    return sum(window(i, j) * kernel[i, j][None, None] for i in range(h) for j in range(w))


def _is_plain(params) -> bool:
    """Stride 1 and an undilated input."""
    return set(params["window_strides"]) == set(params["lhs_dilation"]) == {1}


def _run_aligned(x, kernel, conv, params):
    if params["feature_group_count"] > 1:
        return NotImplemented
    if kernel.shape[:2] == (1, 1) and _is_plain(params) and not any(map(any, params["padding"])):
        return jnp.einsum("nhwi,io->nhwo", x, kernel[0, 0], preferred_element_type=jnp.float32).astype(x.dtype)
    return aligned(x, kernel, conv)


def _run_native(x, kernel, conv, params):
    strides = set(params["window_strides"])
    window = Window(max(strides), tuple(params["padding"]))
    undilated = set(params["lhs_dilation"]) == set(params["rhs_dilation"]) == {1}
    if params["feature_group_count"] > 1 or len(strides) > 1 or not (window.inside(kernel.shape) and undilated):
        return _run_aligned(x, kernel, conv, params)

    def native_convolution(x, kernel):  # `jaxcomp.deploy.fuse` finds the call by this name
        native = lambda x, w: convolution(x, w, "cpu_ffi", window)
        return lax.platform_dependent(x, kernel, cpu=native, default=conv)

    return jax.jit(native_convolution)(x, kernel)


def _run_shifted(x, kernel, conv, params):
    if not _is_plain(params) or params["feature_group_count"] != x.shape[3] or kernel.shape[2:] != (1, x.shape[3]):
        return NotImplemented
    taps = lambda x, kernel: shifted(x, kernel, params["padding"], params["rhs_dilation"])
    return lax.platform_dependent(x, kernel, cpu=taps, default=conv)


_FORMS = {"aligned": _run_aligned, "native": _run_native, "shifted": _run_shifted}


def _rule(x, leaf, spec, conv, params):
    if spec != _NHWC or params["batch_group_count"] > 1:
        return NotImplemented
    out = _FORMS[leaf.form](x, leaf.value, conv, params)
    if out is not NotImplemented:
        tape.event(leaf.name, "conv_general_dilated", f"{leaf.form}_conv", leaf.shape)
    return out


register_conv(ConvFormArray, _rule)
