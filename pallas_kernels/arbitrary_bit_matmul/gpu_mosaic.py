"""The core product on Hopper GPUs for many rows: Pallas Mosaic GPU, weights expanded into registers in front of the tensor cores.

The kernel computes the transposed product (W x^T) [N, M], so that W is the operand that `wgmma` takes from registers. Tiles of W
stay int4 or int8 until they are there. Compiled and interpreted only: no figure of its speed is claimed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, Tile, WeightSpec

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as error:  # jaxlib is built without it on some systems
    plgpu, _missing = None, f"this jax has no Mosaic GPU ({error})"

MIN_ROWS = 16  # below, products are bound by memory and `triton` or `xla` is the better choice
_BLOCK_N = 128  # rows of W in a tile: two `wgmma` of 64
_BLOCK_K = 128
TILES = ((64, 4), (64, 2), (64, 6), (128, 4), (128, 2))  # rows of x, and steps along K in flight


def matmul(
    x: jax.Array,
    weight: Prepared,
    scale: Float[Array, "n g"],
    spec: WeightSpec,
    *,
    tile: Tile = TILES[0],
    staged: bool = False,
) -> Float[Array, "m n"]:
    """See `spec.Backend`; the tile is (rows of x, steps in flight).

    Weights with groups are rounded to bfloat16 after scaling, as those of a bfloat16 model are.

    With `staged`, expanded tiles pass through shared memory instead of registers, which jax's GPU interpreter can follow.
    """
    rows, columns = weight.data.shape
    m = x.shape[0]
    x = jnp.pad(x, ((0, -m % tile[0]), (0, columns - spec.k)))
    grouped = spec.groups > 1
    scales = jnp.pad(scale.T, ((0, 0), (0, rows - spec.n))) if grouped else jnp.ones((1, rows), jnp.float32)
    y = _call(x, weight.data, scales, spec.group_size if grouped else _BLOCK_K, grouped, staged, tile)
    y = y.astype(jnp.float32).T[:m, : spec.n]
    return y if grouped else y * scale[:, 0][None]


def refuse(spec: WeightSpec, x: jax.Array) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    if plgpu is None:
        return _missing
    if jax.default_backend() == "gpu" and not jax.devices()[0].compute_capability.startswith("9."):
        return f"compute capability {jax.devices()[0].compute_capability}; `wgmma` is of 9.0 (Hopper)"
    if x.dtype not in (jnp.int8, jnp.bfloat16):
        return f"activations of {x.dtype}; it takes int8 and bfloat16"
    if x.shape[0] < MIN_ROWS:
        return f"{x.shape[0]} rows; it is for {MIN_ROWS} and more"
    if spec.groups > 1 and x.dtype == jnp.int8:
        return "int8 activations with several groups; it takes one group, or bfloat16"
    if spec.groups > 1 and spec.group_size not in (64, 128):
        return f"groups of {spec.group_size} columns; it takes 64, 128 or one group"
    return None


def layouts(spec: WeightSpec) -> tuple[str, ...]:
    """int4 up to 4 bits, int8."""
    return ("nk_int4", "nk_int8") if spec.bits <= 4 else ("nk_int8",)


def tiles(spec: WeightSpec, x: jax.Array) -> tuple[Tile, ...]:
    """Those with no more steps in flight than K has; none without Mosaic GPU."""
    steps = -(-spec.k // (spec.group_size if spec.groups > 1 else _BLOCK_K))
    return tuple(tile for tile in TILES if tile[1] <= steps or tile == TILES[0]) if plgpu is not None else ()


BACKEND = Backend("mosaic_gpu", layouts, refuse, matmul, tiles)


def _call(x, w, scales, block_k, grouped, staged, tile):
    """(W x^T) [N', M']: int32 for int8 x, else float32."""
    (rows, columns), m, (block_m, stages) = w.shape, x.shape[0], tile
    out = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    scratch = {"y_s": plgpu.SMEM((_BLOCK_N, block_m), out, transforms=_transforms(block_m, 32))}
    if staged:
        scratch["tile_s"] = plgpu.SMEM((_BLOCK_N, block_k), x.dtype, transforms=_transforms(block_k, _bits(x)))
    specs = [
        lambda i: plgpu.BlockSpec((_BLOCK_N, block_k), lambda k: (i, k), transforms=_transforms(block_k, _bits(w))),
        lambda i: plgpu.BlockSpec((1, _BLOCK_N), lambda k: (k if grouped else 0, i)),
        lambda j: plgpu.BlockSpec((block_m, block_k), lambda k: (j, k), transforms=_transforms(block_k, _bits(x))),
    ]
    body = functools.partial(
        _body, specs=specs, steps=columns // block_k, stages=stages, dtype=x.dtype, grouped=grouped
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, m), out),
        grid=(rows // _BLOCK_N, m // block_m),
        grid_names=("n", "m"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(w, scales, x)


def _body(w_g, scales_g, x_g, y_g, *, y_s, tile_s=None, specs, steps, stages, dtype, grouped):
    n, m = lax.axis_index("n"), lax.axis_index("m")

    def product(total):
        def step(_, w_s, scale_s, x_s):
            tile = w_s[...].astype(dtype)
            if grouped:
                scale = lax.broadcast_in_dim(scale_s[0], tile.shape, (0,))
                tile = (w_s[...].astype(jnp.float32) * scale).astype(dtype)
            if tile_s is not None:
                tile_s[...] = tile
                plgpu.commit_smem()
                tile = tile_s
            plgpu.wgmma(total, tile, x_s.T)
            plgpu.wgmma_wait(0)

        in_specs = [make(i) for make, i in zip(specs, (n, n, m), strict=True)]
        plgpu.emit_pipeline(step, grid=(steps,), in_specs=in_specs, max_concurrent_steps=stages)(w_g, scales_g, x_g)
        return total[...]

    y_s[...] = pl.run_scoped(product, plgpu.ACC(y_s.shape, y_s.dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_s, y_g.at[pl.ds(n * _BLOCK_N, _BLOCK_N), pl.ds(m * y_s.shape[1], y_s.shape[1])])
    plgpu.wait_smem_to_gmem(0)


def _transforms(columns: int, bits: int):
    """The widest swizzle that fits a row of a tile."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _bits(a: jax.Array) -> int:
    return jnp.iinfo(a.dtype).bits if jnp.issubdtype(a.dtype, jnp.integer) else jnp.finfo(a.dtype).bits
