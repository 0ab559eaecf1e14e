"""The core product for few rows on NVIDIA GPUs: binary tensor cores read weight planes as they lie, through Triton.

Needs `jax_triton` and a GPU with native binary products (compute capability 8.0 to 9.0; emulated from 10.0 on).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arbitrary_bit_matmul import bmma
from pallas_kernels.arbitrary_bit_matmul.activation import join_digits, split_digits
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, Tile, WeightSpec

STAGES = ((3,), (1,), (2,), (4,))  # of the software pipeline along K
MAX_ROWS = 8  # every row reads the weight, through the cache where it fits


def matmul(
    x: jax.Array, weight: Prepared, scale: Float[Array, "n g"], spec: WeightSpec, tile: Tile = STAGES[0]
) -> Float[Array, "m n"]:
    """See `spec.Backend`; floating-point rows enter as three int8 digits each. The tile is (stages of the pipeline,)."""
    if x.dtype == jnp.int8:
        return _call(x, weight.data, scale, spec, *tile)
    digits, scales = split_digits(x.astype(jnp.float32))
    y = _call(digits.reshape(-1, spec.k), weight.data, scale, spec, *tile)
    return join_digits(y.reshape(*digits.shape[:2], -1), scales)


def refuse(spec: WeightSpec, x: jax.Array) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows; it is for at most {MAX_ROWS}"
    if spec.groups > 1 and spec.group_size != 128 and spec.group_size % bmma.TILE_COLUMNS:
        return f"groups of {spec.group_size} columns; it takes 128, multiples of 256 or one group"
    if jax.default_backend() != "gpu":
        return "no GPU: jax_triton compiles for the device at hand"
    if not 8 <= float(jax.devices()[0].compute_capability) <= 9:
        return f"compute capability {jax.devices()[0].compute_capability}; binary products are native to 8.0 to 9.0"
    return _import_error()


BACKEND = Backend("triton", lambda spec: ("bmma",), refuse, matmul, lambda spec, x: STAGES)


def arguments(x, weight, scale, spec: WeightSpec) -> tuple[tuple[jax.Array, ...], dict[str, int]]:
    """Arrays and compile-time constants of `triton_kernels.bmma_gemv`; the output comes after the arrays."""
    tiles, columns = weight.shape[:2]
    halves = 2 if spec.groups > 1 and spec.group_size == 128 else 1
    fragments = bmma.pack_activations(x)
    padded = jnp.pad(x, ((0, 0), (0, columns * bmma.TILE_COLUMNS - spec.k)))
    sums = padded.reshape(x.shape[0], columns * halves, -1).sum(-1, dtype=jnp.int32) * spec.centre
    scale = jnp.pad(scale, ((0, tiles * bmma.TILE_ROWS - spec.n), (0, 0)))
    constants = {"N": tiles * bmma.TILE_ROWS, "KT": columns, "P": spec.bits, "GROUPS": spec.groups, "HALVES": halves}
    return (weight, fragments, sums, scale), constants | {"PARTS": -(-columns * halves // spec.groups)}


def _call(x, weight, scale, spec, stages):
    import jax_triton

    from pallas_kernels.arbitrary_bit_matmul.triton_kernels import bmma_gemv

    arrays, constants = arguments(x, weight, scale, spec)
    m, n = x.shape[0], constants["N"]
    out = jax.ShapeDtypeStruct((m, n), jnp.float32)
    grid = (n // bmma.TILE_ROWS, m)
    launch = dict(kernel=bmma_gemv, out_shape=out, grid=grid, num_warps=1, num_stages=stages)
    return jax_triton.triton_call(*arrays, **launch, **constants)[:, : spec.n]


def _import_error() -> str | None:
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"jax_triton cannot be imported ({error}); install the extra 'gpu'"
    return None
