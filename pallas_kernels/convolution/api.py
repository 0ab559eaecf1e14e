"""The public function, and what it may run on.

    python -c "from pallas_kernels.convolution import build; print(build())"

XLA's convolution on CPU is fast only where the output channels are a multiple of 16, and computes bfloat16 in float32. The
C++ kernel takes any number of channels and multiplies bfloat16 in pairs where the machine can; it must have been built.
"""

from __future__ import annotations

import functools
import pathlib

import jax
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import native

SOURCE = pathlib.Path(__file__).with_name("cpu_ffi.cc")
BACKENDS = ("cpu_ffi", "xla")
_FLAGS = native.FLAGS
_TARGET = "pallas_kernels_convolution"


def is_built() -> bool:
    """Whether the C++ kernel is in the user's cache for this source and machine."""
    return native.library(SOURCE, _FLAGS).is_file()


def build() -> pathlib.Path:
    """Compiles the C++ kernel, if it is not there, and returns its path. Raises RuntimeError as `native.build`."""
    return native.build(SOURCE, _FLAGS)


def convolution(
    x: Float[Array, "N H W I"], kernel: Float[Array, "h w I O"], implementation: str | None = None
) -> Float[Array, "N H W O"]:
    """Correlation with zeros around the map, float32 sums, dtype of x.

    Args:
      x: float32 or bfloat16.
      kernel: of the same dtype, h and w odd.
      implementation: one of `BACKENDS`; None takes the C++ kernel on CPU if it has been built, else XLA. Only XLA has
        gradients.

    Raises:
      ValueError: shapes, dtypes or the implementation are wrong.
      RuntimeError: "cpu_ffi" is asked for and cannot be built.
    """
    _check(x, kernel)
    if implementation not in (None, *BACKENDS):
        raise ValueError(f"implementation {implementation!r} is unknown; expected one of {BACKENDS} or None")
    if implementation == "xla" or (implementation is None and not is_built()):
        return _xla(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_cpu_ffi, default=_xla)


def _xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _cpu_ffi(x: jax.Array, kernel: jax.Array) -> jax.Array:
    _register()
    out = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[3]), x.dtype)
    return jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")(x, kernel)


@functools.cache
def _register() -> None:
    native.register(_TARGET, "Convolution", build())


def _check(x: jax.Array, kernel: jax.Array) -> None:
    found = f"x {x.dtype} {x.shape}, kernel {kernel.dtype} {kernel.shape}"
    if x.dtype != kernel.dtype or x.dtype.name not in ("float32", "bfloat16"):
        raise ValueError(f"expected float32 or bfloat16, the same for both, found {found}")
    if (
        x.ndim != 4
        or kernel.ndim != 4
        or x.shape[3] != kernel.shape[2]
        or not (kernel.shape[0] % 2 and kernel.shape[1] % 2)
    ):
        raise ValueError(f"expected x [N, H, W, I] and a kernel [h, w, I, O] with h and w odd, found {found}")
