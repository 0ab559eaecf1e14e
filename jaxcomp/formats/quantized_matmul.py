"""Products with a quantized matrix, in plain XLA: weight-only, and integer with quantized activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.formats import packing

_BLOCK_BYTES = 1 << 20  # a CPU decodes at most this much of a weight at once
_SMALL_BYTES = 1 << 14  # not worth a loop


def kernel_name(leaf) -> str:
    """The kernel that `matmul` will run, as `explain` prints it."""
    group = f",g{leaf.grid.group_size}" if leaf.grid.group_size > 0 else ""
    levels = f"l{leaf.grid.levels}" if leaf.grid.levels else ""
    if leaf.act is None:
        return f"decode_matmul[w{leaf.grid.bits}{levels}{group}]"
    return f"int8_matmul[w{leaf.grid.bits}{levels}a{leaf.act.grid.bits}{group}]"


def matmul(x: jax.Array, leaf) -> jax.Array:
    """x [..., K] times the transposed matrix of an unbatched leaf: [..., N], float32 accumulation, dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    y = _decode_matmul(flat, leaf) if leaf.act is None else _integer_matmul(flat, leaf)
    return y.reshape(*x.shape[:-1], -1)


def _decode_matmul(x: jax.Array, leaf) -> jax.Array:
    """y = x ((u - z) s)^T; per-channel scales are applied to the product, group scales to the weight."""
    n, k = leaf.layout.matrix_shape
    rows = _row_block(n, k)
    scale, zero = _per_row(leaf, n)
    if rows == n:
        return _decode_block(x, leaf.packed, scale, zero, leaf.grid)
    blocks = lambda a: a.reshape(n // rows, rows, *a.shape[1:])

    def blocked(x, packed, scale, zero):
        y = lax.map(lambda b: _decode_block(x, *b, leaf.grid), (blocks(packed), blocks(scale), blocks(zero)))
        return y.transpose(1, 0, 2).reshape(x.shape[0], n)

    whole = lambda x, packed, scale, zero: _decode_block(x, packed, scale, zero, leaf.grid)
    return lax.platform_dependent(x, leaf.packed, scale, zero, cpu=blocked, default=whole)


def _decode_block(x, packed, scale, zero, grid) -> jax.Array:
    u = packing.unpack(packed, grid.bits, x.shape[1]).astype(jnp.float32)
    groups = scale.shape[-1]
    w = u.reshape(u.shape[0], groups, -1) - zero[..., None].astype(jnp.float32)
    if groups > 1:
        w = w * scale[..., None].astype(jnp.float32)
    w = w.reshape(u.shape).astype(x.dtype)
    y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    y = y if groups > 1 else y * scale[:, 0].astype(jnp.float32)[None]
    return y.astype(x.dtype)


def _integer_matmul(x: jax.Array, leaf) -> jax.Array:
    """Exact integer product of codes, then scales and zero points (ABQ-LLM, arXiv 2408.08554, section 2.6 corrected):

    y = sx sum_g s_g ((qx qw^T)_g - zx rowsum(qw)_g - zw_g rowsum(qx)_g + (K/G) zx zw_g)

    All codes are shifted by half their range into int8, so that the product is one int8 x int8 -> int32 `dot_general` per group.
    """
    n, k = leaf.layout.matrix_shape
    half_x, half_w = 2 ** (leaf.act.grid.bits - 1), 2 ** (leaf.grid.bits - 1)
    codes, scale_x, zero_x = leaf.act.encode(x)
    scale, zero_w = _per_row(leaf, n)
    groups = scale.shape[-1]
    qx = (codes.astype(jnp.int32) - half_x).astype(jnp.int8).reshape(-1, groups, k // groups)
    qw = (
        (packing.unpack(leaf.packed, leaf.grid.bits, k).astype(jnp.int32) - half_w)
        .astype(jnp.int8)
        .reshape(n, groups, -1)
    )
    zx = zero_x.astype(jnp.int32) - half_x  # [M, 1]
    zw = zero_w.astype(jnp.int32) - half_w  # [N, G]
    d = lax.dot_general(qx, qw, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.int32)  # [G, M, N]
    sum_w = qw.astype(jnp.int32).sum(-1).T[:, None, :]  # [G, 1, N]
    sum_x = qx.astype(jnp.int32).sum(-1).T[:, :, None]  # [G, M, 1]
    zx, zw = zx[None], zw.T[:, None, :]
    d = d - zx * sum_w - zw * sum_x + (k // groups) * zx * zw
    y = (d.astype(jnp.float32) * scale.astype(jnp.float32).T[:, None, :]).sum(0)
    return (y * scale_x).astype(x.dtype)


def _per_row(leaf, n: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point (float32) as [N, G], broadcast from per-tensor where needed."""
    zero = jnp.asarray(leaf.zero(), jnp.float32)
    shape = (n, leaf.scale.shape[-1])
    zero = jnp.full(shape, zero) if zero.ndim == 0 else jnp.broadcast_to(zero, shape)
    return jnp.broadcast_to(leaf.scale, shape), zero


def _row_block(n: int, k: int) -> int:
    """Rows decoded at once: all of a small matrix, else the largest divisor of n that makes two blocks or more of at most
    `_BLOCK_BYTES`. A loop keeps the decoding of a layer behind that layer's input; without one XLA's CPU scheduler decodes
    all layers up front.
    """
    if n * k * 4 <= _SMALL_BYTES:
        return n
    limit = min(_BLOCK_BYTES, n * k * 2)
    return max((r for r in range(1, n + 1) if n % r == 0 and r * k * 4 <= limit), default=1)
