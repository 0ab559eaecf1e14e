"""The truth: integer products by bit planes, dense products of decoded weights, and products of codes in floating point.

ABQ-LLM (arXiv 2408.08554), binary decomposition: X = sum_s c_s X^(s), W = sum_t c_t W^(t) with c_i = 2^i, but -2^top for the top
plane of two's complement (of one plane too: its codes are {-1, 0}), so that

    X W^T = sum_s sum_t c_s c_t popcount(X^(s) AND W^(t))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pallas_kernels.arbitrary_bit_matmul import layouts, packing
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, WeightSpec

_EXACT = 2**24  # float32 holds all integers up to here


def plane_coefficients(bits: int, signed: bool = False) -> Int32[Array, "b"]:
    """Weights of bit planes: 2^i; the top plane of two's complement counts negatively."""
    coefficients = 1 << jnp.arange(bits, dtype=jnp.int32)
    return coefficients.at[-1].multiply(-1) if signed else coefficients


def plane_product(
    x: UInt32[Array, "p m words"],
    w: UInt32[Array, "q n words"],
    x_coefficients: Int32[Array, "p"],
    w_coefficients: Int32[Array, "q"],
) -> Int32[Array, "m n"]:
    """Exact integer product X W^T of bit planes (`packing.pack_planes`), one pair of planes after the other."""
    p, q = x.shape[0], w.shape[0]

    def add_pair(total, pair):
        s, t = pair // q, pair % q
        count = lax.population_count(x[s][:, None] & w[t][None]).sum(-1, dtype=jnp.uint32)
        return total + x_coefficients[s] * w_coefficients[t] * count.astype(jnp.int32), None

    start = jnp.zeros((x.shape[1], w.shape[1]), jnp.int32)
    return lax.scan(add_pair, start, jnp.arange(p * q))[0]


def grouped_plane_product(
    qx: UInt8[Array, "m k"], qw: UInt8[Array, "n k"], x_bits: int, w_bits: int, groups: int
) -> Int32[Array, "g m n"]:
    """Exact products of unsigned codes, one per group of K / G columns."""
    planes = lambda q, bits: packing.pack_planes(jnp.moveaxis(q.reshape(q.shape[0], groups, -1), 1, 0), bits)
    product = jax.vmap(plane_product, in_axes=(1, 1, None, None))
    return product(planes(qx, x_bits), planes(qw, w_bits), plane_coefficients(x_bits), plane_coefficients(w_bits))


def epilogue(
    products: Int32[Array, "g m n"],
    qx: UInt8[Array, "m k"],
    x_scale: Float[Array, "m 1"],
    x_zero: Float[Array, "m 1"],
    qw: UInt8[Array, "n k"],
    scale: Float[Array, "n g"],
    zero: Float[Array, "n g"],
) -> Float[Array, "m n"]:
    """Scales and zero points of an integer product, in float32:

    y[m,n] = sx[m] sum_g s[n,g] ((qx qw^T)_g - zx[m] rowsum_g(qw)[n] - z[n,g] rowsum_g(qx)[m] + (K/G) zx[m] z[n,g])
    """
    groups = products.shape[0]
    sums = lambda q: q.reshape(q.shape[0], groups, -1).astype(jnp.int32).sum(-1).T.astype(jnp.float32)  # [G, rows]
    sum_x, sum_w = sums(qx)[:, :, None], sums(qw)[:, None, :]
    zx, zw, size = x_zero[None], zero.T[:, None, :], qw.shape[1] / groups
    bracket = products.astype(jnp.float32) - zx * sum_w - zw * sum_x + size * zx * zw
    return x_scale * (scale.T[:, None, :] * bracket).sum(0)


def decode(codes: UInt8[Array, "n k"], scale: Float[Array, "n g"], zero: Float[Array, "n g"]) -> Float[Array, "n k"]:
    """Values (u - z) s in float32."""
    grouped = codes.reshape(codes.shape[0], scale.shape[-1], -1).astype(jnp.float32)
    return ((grouped - zero[..., None]) * scale[..., None]).reshape(codes.shape)


def dense_product(
    x: Float[Array, "m k"], codes: UInt8[Array, "n k"], scale: Float[Array, "n g"], zero: Float[Array, "n g"]
) -> Float[Array, "m n"]:
    """x times the decoded matrix transposed, float32 at the highest precision."""
    w = decode(codes, scale, zero)
    return jnp.einsum("mk,nk->mn", x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)


def float_matmul(x: jax.Array, weight: Prepared, scale: Float[Array, "n g"], spec: WeightSpec) -> Float[Array, "m n"]:
    """See `spec.Backend`: the codes as float32, so that a model with fake quantization and a packed one share every rounding."""
    grouped = lambda a: a.reshape(a.shape[0], spec.groups, -1).astype(jnp.float32)
    codes = grouped(layouts.unpack(weight, spec)) - spec.centre
    products = jnp.einsum("mgk,ngk->gmn", grouped(x), codes, precision=lax.Precision.HIGHEST)
    return (products * scale.T[:, None]).sum(0)


def _inexact(spec: WeightSpec, x: jax.Array) -> str | None:
    largest = spec.group_size * 2**7 * max(spec.centre, (spec.levels or 2**spec.bits) - 1 - spec.centre)
    if x.dtype == jnp.int8 and largest > _EXACT:
        return f"sums of up to {largest} are not exact in float32"
    return None


BACKEND = Backend("reference", lambda spec: layouts.LAYOUTS, _inexact, float_matmul)
