"""Products with a quantized matrix: the parts of a leaf, handed to `pallas_kernels.arbitrary_bit_matmul`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomp.formats import storage as stores
from pallas_kernels.arbitrary_bit_matmul import ActivationCodes, Prepared, api, arbitrary_bit_matmul, code_matmul


def kernel_name(leaf, rows: int | None = None) -> str:
    """The kernel that `matmul` will run, as `explain` prints it; with `rows` of activations also the implementation."""
    group = f",g{leaf.grid.group_size}" if leaf.grid.group_size > 0 else ""
    levels = f"l{leaf.grid.levels}" if leaf.grid.levels else ""
    act = "" if leaf.act is None else f"a{leaf.act.grid.bits}"
    stored = "" if leaf.storage == stores.DENSE else f",{leaf.storage}"
    bits = f"w{leaf.grid.bits}{levels}{act}{group}{stored}"
    name = f"{'int8' if act else 'decode'}_matmul[{bits}]"
    return name if rows is None else f"{name}@{_chosen(leaf, rows)}"


def matmul(x: jax.Array, leaf) -> jax.Array:
    """x [..., K] times the transposed matrix of an unbatched leaf: [..., N], float32 accumulation, dtype of x.

    Weight-only leaves multiply x with (u - z) s. Leaves with an activation quantizer encode x and multiply integers, exactly
    within a group (ABQ-LLM, arXiv 2408.08554, section 2.6 corrected); gradients go straight through the rounding of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = _decode_matmul(flat, leaf) if leaf.act is None else _integer_matmul(flat, leaf)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _decode_matmul(x: jax.Array, leaf) -> jax.Array:
    return arbitrary_bit_matmul(x, _prepared(leaf), *_per_row(leaf), **_static(leaf))


@jax.custom_vjp
def _integer_matmul(x: jax.Array, leaf) -> jax.Array:
    codes, scale, zero = leaf.act.encode(x)
    half = 2 ** (leaf.act.grid.bits - 1)
    codes = (codes.astype(jnp.int32) - half).astype(jnp.int8)
    zero = zero - half if _has_zero(leaf.act) else None
    return code_matmul(ActivationCodes(codes, scale, zero), _prepared(leaf), *_per_row(leaf), **_static(leaf))


def _fake_matmul(x: jax.Array, leaf) -> jax.Array:
    return leaf.act.fake(x.astype(jnp.float32)) @ leaf.matrix().T


_integer_matmul.defvjp(
    lambda x, leaf: (_integer_matmul(x, leaf), (x, leaf)), lambda saved, dy: jax.vjp(_fake_matmul, *saved)[1](dy)
)


def _prepared(leaf) -> Prepared:
    return Prepared(leaf.packed, leaf.storage)


def _per_row(leaf) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point (None: the middle code) as [N, G], broadcast from per-tensor where needed."""
    shape = (leaf.layout.matrix_shape[0], leaf.scale.shape[-1])
    zero = None if leaf.zero_point is None else jnp.broadcast_to(leaf.zero_point, shape)
    return jnp.broadcast_to(leaf.scale, shape), zero


def _has_zero(act) -> bool:
    """Whether the zero point of activations may be another code than 2^(bits - 1)."""
    return not act.grid.symmetric or act.zero_point is not None or act.grid.count != 2**act.grid.bits


def _static(leaf) -> dict:
    return dict(bits=leaf.grid.bits, levels=leaf.grid.levels, implementation=_implementation())


def _implementation() -> str | None:
    """XLA wherever arrays may be sharded: the other implementations cannot be partitioned."""
    return "xla" if jax.device_count() > 1 else None


def _chosen(leaf, rows: int) -> str:
    """The implementation that the default platform takes for this many rows."""
    if (name := _implementation()) is not None:
        return name
    return api.choose(*problem(leaf, rows), api.platform_preference(), convert=False).name


def problem(leaf, rows: int):
    """(static facts, abstract activations, abstract weight) of a product with `rows` vectors, for `api.choose`."""
    shape, dtype = leaf.layout.matrix_shape, jnp.float32
    if leaf.act is not None:
        dtype, rows = jnp.int8, rows + _has_zero(leaf.act)  # a row of ones for the zero point
    packed = Prepared(stores.stored(leaf.grid, leaf.storage, shape), leaf.storage)
    return stores.weight_spec(leaf.grid, shape), jax.ShapeDtypeStruct((rows, shape[1]), dtype), packed
