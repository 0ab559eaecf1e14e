"""The core product for few rows on CPU as a C++ call: optional, built once per source and machine by the system's compiler.

    python -c "from pallas_kernels.arbitrary_bit_matmul import cpu_ffi; print(cpu_ffi.build())"

`implementation="cpu_ffi"` builds on first use; `implementation=None` uses it where it has been built. Dense rows of any width are
read as they lie; floating-point rows enter as three int8 digits each, as in `activation.split_digits`.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import native
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, WeightSpec

DIGITS = 3
MAX_ROWS = 16  # int8 rows above which XLA's product is faster
_TARGET = "pallas_kernels_arbitrary_bit_matmul"
LIBRARY = native.Library(pathlib.Path(__file__).with_name("cpu_ffi.cc"), ((_TARGET, "ArbitraryBitMatmul"),))
is_built, build = LIBRARY.is_built, LIBRARY.build


def matmul(x: jax.Array, weight: Prepared, scale: Float[Array, "n g"], spec: WeightSpec) -> Float[Array, "m n"]:
    """See `spec.Backend`."""
    LIBRARY.register()
    x = x if x.dtype == jnp.int8 else x.astype(jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((x.shape[0], spec.n), jnp.float32), vmap_method="sequential")
    static = dict(bits=spec.bits, centre=spec.centre, digits=DIGITS, base5=weight.layout == "base5")
    return call(x, weight.data, scale, **static)


def refuse(spec: WeightSpec, x: jax.Array) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    most = MAX_ROWS if x.dtype == jnp.int8 else MAX_ROWS // DIGITS
    if x.shape[0] > most:
        return f"{x.shape[0]} rows of {x.dtype}; it is for at most {most}, XLA is faster above"
    if spec.groups > 1 and spec.group_size % 64 and spec.group_size not in (4, 8, 16, 32):
        return f"groups of {spec.group_size} columns; it takes 4, 8, 16, 32, multiples of 64, or one group"
    return LIBRARY.refuse()


def layouts(spec: WeightSpec) -> tuple[str, ...]:
    """Dense rows; base 5 where it applies."""
    return ("base5", "dense") if spec.levels == 5 and spec.groups == 1 else ("dense",)


BACKEND = Backend("cpu_ffi", layouts, refuse, matmul)
