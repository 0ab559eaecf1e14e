"""The core product as a Pallas TPU kernel: weights cross memory at their stored width and are expanded next to the matrix unit.

Per grid step (row block, column block, K block) a tile of W is expanded to the type of x and multiplied, int8 x int8 -> int32 on
generations that have it (v5e on; not v4). Small batches are bound by this expansion, so 4 bits are stored as int4 and 5 to 8 as
int8, which the hardware converts; bit planes serve 1 to 3 bits, where they save most bytes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared, tpu_block
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, Tile, WeightSpec

_LANES = 128
TILES = ((128, 256), (128, 128), (128, 512), (64, 256), (256, 256), (256, 512))  # rows of x, at most, and rows of W


def matmul(
    x: jax.Array,
    weight: Prepared,
    scale: Float[Array, "n g"],
    spec: WeightSpec,
    *,
    tile: Tile = TILES[0],
    interpret=False,
) -> Float[Array, "m n"]:
    """See `spec.Backend`; the tile is (rows of x, rows of W), `interpret` is that of `pl.pallas_call`."""
    m, (columns, rows) = x.shape[0], _padded(weight)
    block_k, block_n = tpu_block(spec), tile[1] if rows % tile[1] == 0 else _LANES
    block_m = min(tile[0], -(-m // 32) * 32)
    x = jnp.pad(x, ((0, -m % block_m), (0, columns - spec.k)))
    scale, parts = _block_scales(scale, spec, rows, columns)
    steps = columns // block_k
    planes = weight.layout == "kn_planes"
    body = functools.partial(
        _body, expand=_expand_planes if planes else _expand_integers, centre=spec.centre, parts=parts
    )
    w_block = pl.BlockSpec((block_k, block_n), lambda i, j, k: (k, j))
    if planes:
        w_block = pl.BlockSpec((spec.bits, block_k // 32, block_n), lambda i, j, k: (0, k, j))
    y = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], rows), jnp.float32),
        grid=(x.shape[0] // block_m, rows // block_n, steps),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda i, j, k: (i, k)),
            w_block,
            pl.BlockSpec((1, parts, block_n), lambda i, j, k: (k if spec.groups > 1 else 0, 0, j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(x, weight, scale, rows),
        interpret=interpret,
    )(x, weight.data, scale)
    return y[:m, : spec.n]


def refuse(spec: WeightSpec, x: jax.Array) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    if spec.groups > 1 and spec.group_size % _LANES:
        return f"groups of {spec.group_size} columns; it takes multiples of {_LANES}, or one group"
    if x.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        return f"activations of {x.dtype}; it takes int8, bfloat16 and float32"
    return None


def layouts(spec: WeightSpec) -> tuple[str, ...]:
    """Bit planes up to 3 bits, int4, int8."""
    if spec.bits <= 3:
        return "kn_planes", "kn_int4", "kn_int8"
    return ("kn_int4", "kn_int8") if spec.bits == 4 else ("kn_int8",)


def tiles(spec: WeightSpec, x: jax.Array) -> tuple[Tile, ...]:
    """Those that cut rows of W evenly, one per block of x where x is small."""
    rows = -(-spec.n // _LANES) * _LANES
    return tuple(t for t in TILES if rows % t[1] == 0 and (t[0] == TILES[0][0] or x.shape[0] > min(t[0], TILES[0][0])))


BACKEND = Backend("tpu", layouts, refuse, matmul, tiles)


def _body(x_ref, w_ref, s_ref, o_ref, total, *, expand, centre, parts):
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    x, w = x_ref[...], expand(w_ref, centre, x_ref.dtype)
    accumulator = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    size = x.shape[1] // parts
    for g in range(parts):
        part = slice(g * size, (g + 1) * size)
        product = jnp.dot(x[:, part], w[part], preferred_element_type=accumulator, precision=precision)
        total[...] += product.astype(jnp.float32) * s_ref[0, g][None]

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = total[...]


def _expand_integers(w_ref, centre, dtype):
    del centre  # stored centred
    return _cast(w_ref[...], dtype)


def _expand_planes(w_ref, centre, dtype):
    """Bit j of the words of a block is a run of rows: 32 shifts and a concatenation."""
    planes = [w_ref[p] for p in range(w_ref.shape[0])]

    def run(j):
        bits = [(lax.shift_right_logical(plane, jnp.int32(j)) & 1) << p for p, plane in enumerate(planes)]
        return functools.reduce(jnp.bitwise_or, bits)

    return _cast(jnp.concatenate([run(j) for j in range(32)], 0) - centre, dtype)


def _cast(w, dtype):
    """Integers to int8, or to floating point by way of float32."""
    return w.astype(dtype) if dtype == jnp.int8 else w.astype(jnp.float32).astype(dtype)


def _block_scales(scale, spec, rows, columns):
    """Scales [blocks along K, groups in a block, N'] and the groups in a block; one block where there is one group."""
    parts = 1 if spec.groups == 1 else tpu_block(spec) // spec.group_size
    groups = 1 if spec.groups == 1 else columns // spec.group_size
    padded = jnp.pad(scale.T, ((0, groups - spec.groups), (0, rows - spec.n)))
    return padded.reshape(-1, parts, rows), parts


def _padded(weight: Prepared) -> tuple[int, int]:
    """Columns and rows of W with padding."""
    return (32 * weight.data.shape[1], weight.data.shape[2]) if weight.layout == "kn_planes" else weight.data.shape


def _cost(x, weight, scale, rows):
    size = lambda a: a.size * jnp.iinfo(a.dtype).bits // 8 if jnp.issubdtype(a.dtype, jnp.integer) else a.nbytes
    moved = size(x) + size(weight.data) + size(scale) + 4 * x.shape[0] * rows
    return pl.CostEstimate(flops=2 * x.size * rows, bytes_accessed=moved, transcendentals=0)
