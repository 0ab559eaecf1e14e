"""How the codes of a `QuantizedArray` lie in memory: dense words, or a layout of `pallas_kernels.arbitrary_bit_matmul`.

"dense" is the canonical form of `jaxcomp.formats.packing`; "bytes" the same as bytes, which XLA on CPU reads faster; "base5"
holds five-level codes in 7/3 bits; the other layouts are those that kernels for TPU and GPU read without a conversion in every
call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jaxcomp.formats import packing
from jaxcomp.formats.grid import Grid
from pallas_kernels.arbitrary_bit_matmul import LAYOUTS, WeightSpec

DENSE, BASE5 = "dense", "base5"
STORAGES = tuple(LAYOUTS)


def weight_spec(grid: Grid, shape: tuple[int, int]) -> WeightSpec:
    """The static facts of a matrix [N, K] on a grid. Raises ValueError if its groups do not divide K."""
    n, k = shape
    return WeightSpec(n, k, grid.groups(k), grid.bits, grid.levels)


def pack(codes: UInt8[Array, "*batch n k"], grid: Grid, storage: str = DENSE) -> jax.Array:
    """Stores unsigned codes. Raises ValueError if the layout cannot hold them."""
    check(grid, storage)
    if storage == DENSE:
        return packing.pack(codes, grid.bits)
    spec = weight_spec(grid, codes.shape[-2:])
    return _over_batch(lambda c: LAYOUTS[storage].pack(c, spec), codes.ndim - 2)(codes)


def unpack(packed: jax.Array, grid: Grid, storage: str, shape: tuple[int, int]) -> UInt8[Array, "*batch n k"]:
    """The inverse of `pack` for matrices of this shape."""
    if storage == DENSE:
        return packing.unpack(packed, grid.bits, shape[1])
    spec = weight_spec(grid, shape)
    batch = packed.ndim - stored(grid, storage, shape).ndim
    return _over_batch(lambda p: LAYOUTS[storage].unpack(p, spec), batch)(packed)


def stored(grid: Grid, storage: str, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one stored matrix [N, K]."""
    if storage == DENSE:
        return jax.ShapeDtypeStruct((shape[0], packing.packed_words(shape[1], grid.bits)), jnp.uint32)
    return _stored(weight_spec(grid, shape), storage)


def check(grid: Grid, storage: str) -> None:
    """Raises ValueError for an unknown layout, or one that cannot hold the codes of the grid."""
    if storage not in LAYOUTS:
        raise ValueError(f"storage {storage!r} is unknown; known are {', '.join(LAYOUTS)}")
    if storage == BASE5 and grid.count != 5:
        raise ValueError(f"storage 'base5' holds five levels, the grid has {grid.count}")
    if storage.endswith("int4") and grid.bits > 4:
        raise ValueError(f"storage {storage!r} holds at most 4 bits, the grid has {grid.bits}")


@functools.cache
def _stored(spec: WeightSpec, storage: str) -> jax.ShapeDtypeStruct:
    codes = jax.ShapeDtypeStruct((spec.n, spec.k), jnp.uint8)
    return jax.eval_shape(lambda c: LAYOUTS[storage].pack(c, spec), codes)


def _over_batch(function: Callable, ndim: int) -> Callable:
    for _ in range(ndim):
        function = jax.vmap(function)
    return function
