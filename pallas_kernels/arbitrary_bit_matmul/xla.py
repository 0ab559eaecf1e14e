"""The core product in plain XLA: the default everywhere, and fast on CPU where the obvious forms are not.

A dense row is read as it lies, fastest as bytes. The codes at one bit offset of all bytes (for odd widths: of all runs of 32
codes) form a lane; a shift and a mask bring them to int8, and it is the few activations that are permuted to meet them, never the
weights. XLA on CPU expands both operands of a one-row product to float32 but reads int8 as it is from two rows on, so rows are
padded, and weights are expanded in blocks that stay in cache. Few floating-point rows enter as three int8 digits each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8, UInt32

from pallas_kernels.arbitrary_bit_matmul import layouts, packing
from pallas_kernels.arbitrary_bit_matmul.activation import join_digits, split_digits
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, Tile, WeightSpec

BLOCKS = tuple((1 << power,) for power in (18, 16, 17, 19, 20))  # bytes of expanded weights that have to stay in cache
SMALL_BYTES = 1 << 13  # expanded weights that are not worth a loop
DIGIT_ROWS = 4  # up to this many floating-point rows, digits beat float32 weights
LANE_CODES = 64  # a lane of a group has to be this long for the same


def matmul(
    x: jax.Array, weight: Prepared, scale: Float[Array, "n g"], spec: WeightSpec, tile: Tile = BLOCKS[0]
) -> Float[Array, "m n"]:
    """See `spec.Backend`; the tile is (bytes of a block of expanded rows,), on CPU."""
    if weight.layout not in ("dense", "bytes") or not _aligned(spec):
        return _from_codes(x, weight, scale, spec, *tile)
    if x.dtype == jnp.int8:
        cpu, other = _integer, _integer_groups if spec.groups > 1 else _integer_rows
    else:
        few = x.shape[0] <= DIGIT_ROWS and (spec.groups == 1 or spec.group_size // _lanes(spec.bits) >= LANE_CODES)
        cpu, other = _digits if few else _floating, _floating_rows
    return lax.platform_dependent(
        x,
        weight.data,
        scale,
        cpu=lambda *args: cpu(*args, spec, *tile),
        default=lambda *args: other(*args, spec),
    )


def tiles(spec: WeightSpec, x: jax.Array) -> tuple[Tile, ...]:
    """Sizes of a block of rows; integer products with groups go group by group instead."""
    by_groups = x.dtype == jnp.int8 and spec.groups > 1 and _aligned(spec)
    return () if by_groups or jax.default_backend() != "cpu" else BLOCKS


def known(spec: WeightSpec) -> tuple[str, ...]:
    """All; bytes first where codes do not straddle them."""
    first = "bytes" if 8 % spec.bits == 0 else "dense"
    return (first, *(name for name in layouts.LAYOUTS if name != first))


BACKEND = Backend("xla", known, lambda spec, x: None, matmul, tiles)


class _Rows(NamedTuple):
    """Activations permuted to meet the lanes of the codes.

    Attributes:
      lanes: arrays [M, G, c], see `_code_lanes`.
      rest: what the product with the codes still lacks, (centre - `_offset`) times the sums of x, [M, G].
    """

    lanes: list[jax.Array]
    rest: jax.Array


def _integer(x, words, scale, spec, block):
    """Exact int8 product: row blocks with one scale per row, a scan over groups otherwise."""
    m, x = x.shape[0], _two_rows(x)
    if spec.groups > 1:
        return _group_scan(_permute(x, spec), words, scale, spec)[:m]
    rows = functools.partial(_lane_product, jax.tree.map(lambda a: a[:, 0], _permute(x, spec)))
    return _by_row_blocks(lambda w, s: rows(w, s[:, 0], spec), (words, scale), spec, 1, block)[:m]


def _integer_rows(x, words, scale, spec):
    return _lane_product(jax.tree.map(lambda a: a[:, 0], _permute(x, spec)), words, scale[:, 0], spec)


def _group_scan(x: _Rows, words, scale, spec):
    """sum_g s_g d_g, one group of all rows at a time: groups are strided slices of the dense rows."""
    words = words.reshape(words.shape[0], spec.groups, -1)

    def add_group(total, g):
        take = lambda a: lax.dynamic_index_in_dim(a, g, 1, keepdims=False)
        return total + _lane_product(jax.tree.map(take, x), take(words), take(scale), spec), None

    start = jnp.zeros((x.rest.shape[0], words.shape[0]), jnp.float32)
    return lax.scan(add_group, start, jnp.arange(spec.groups))[0]


def _lane_product(x: _Rows, words: jax.Array, scale: Float[Array, "n"], spec: WeightSpec):
    """x (u - centre)^T s of one group, exact before the scale: float32 [M, N]."""
    pairs = zip(x.lanes, _code_lanes(words, spec.bits), strict=True)
    product = sum(_dot(a, w, jnp.int32) for a, w in pairs)
    return (product - x.rest[:, None]).astype(jnp.float32) * scale[None]


def _digits(x, words, scale, spec, block):
    """Floating-point rows through the integer product of their digits: exact but for 2^-24 of a row's maximum."""
    digits, scales = split_digits(x.astype(jnp.float32))
    y = _integer(digits.reshape(-1, x.shape[1]), words, scale, spec, block)
    return join_digits(y.reshape(*digits.shape[:2], -1), scales)


def _floating(x, words, scale, spec, block):
    m, x = x.shape[0], _permute(_two_rows(x.astype(jnp.float32)), spec)
    return _by_row_blocks(lambda w, s: _value_product(x, w, s, spec), (words, scale), spec, 4, block)[:m]


def _floating_rows(x, words, scale, spec):
    return _value_product(_permute(x, spec), words, scale, spec)


def _value_product(x: _Rows, words, scale, spec):
    """Weights expanded in the dtype of x, scales and all; float32 accumulation."""
    lanes = _code_lanes(words.reshape(words.shape[0], spec.groups, -1), spec.bits)
    centre, dtype = spec.centre - _offset(spec.bits), x.rest.dtype
    value = lambda u: ((u.astype(jnp.float32) - centre) * scale[..., None]).astype(dtype)
    flat = lambda a: a.reshape(a.shape[0], -1)
    return sum(_dot(flat(a), flat(value(u)), jnp.float32) for a, u in zip(x.lanes, lanes, strict=True))


def _integer_groups(x, words, scale, spec):
    """All groups at once: one product per group."""
    x = _permute(x, spec)
    lanes = _code_lanes(words.reshape(words.shape[0], spec.groups, -1), spec.bits)
    product = sum(_group_dot(a, w, jnp.int32) for a, w in zip(x.lanes, lanes, strict=True))
    return ((product - x.rest.T[..., None]).astype(jnp.float32) * scale.T[:, None]).sum(0)


def _from_codes(x, weight, scale, spec, block):
    """Any layout, and groups that begin inside words: one product per group of codes, exact for integers.

    Rows that are stored one by one are expanded in blocks, the layouts of other kernels whole.
    """
    m, x = x.shape[0], _two_rows(x)
    grouped = lambda a: a.reshape(a.shape[0], spec.groups, -1)
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def product(stored, scale):
        codes = layouts.unpack(Prepared(stored, weight.layout), spec).astype(jnp.int32) - spec.centre
        each = _group_dot(grouped(x), grouped(codes.astype(x.dtype)), dtype)
        return (each.astype(jnp.float32) * scale.T[:, None]).sum(0)

    if weight.layout not in layouts.BY_ROWS:
        return product(weight.data, scale)[:m]
    return _by_row_blocks(product, (weight.data, scale), spec, x.dtype.itemsize, block)[:m]


def _by_row_blocks(product, operands, spec, itemsize, block):
    """product(*operands) [M, N], blocks of rows that expand to `block` bytes one after the other, all at once only if tiny.

    The loop also keeps the expansion of a layer behind that layer's input; without one XLA's scheduler on CPU expands the
    weights of all layers up front.
    """
    n, size = spec.n, spec.k * itemsize
    if n * size <= SMALL_BYTES:
        return product(*operands)
    rows = min(max(16, block // size // 16 * 16), -(-n // 2))
    whole = n // rows * rows
    blocks = lax.map(lambda b: product(*b), [a[:whole].reshape(n // rows, rows, -1) for a in operands])
    y = blocks.transpose(1, 0, 2).reshape(-1, whole)
    return y if whole == n else jnp.concatenate([y, product(*[a[whole:] for a in operands])], 1)


def _code_lanes(words: UInt32[Array, "*rows w"] | UInt8[Array, "*rows 4w"], bits: int) -> list[Int8[Array, "*rows c"]]:
    """Codes of dense words or bytes minus `_offset` as int8, in an order that `_permute` shares."""
    as_bytes = words.dtype == jnp.uint8
    if 8 % bits == 0:
        data = words if as_bytes else packing.words_to_bytes(words)
        lanes = packing.byte_lanes(data, _lanes(bits))
        return [lax.bitcast_convert_type(codes ^ jnp.uint8(_offset(bits)), jnp.int8) for codes in lanes]
    words = packing.bytes_to_words(words) if as_bytes else words
    words = packing.pad_last(words, bits)  # full runs of 32 codes
    runs = jnp.moveaxis(words.reshape(*words.shape[:-1], -1, bits), -1, 0)
    codes = jnp.stack([_lane(runs, i, bits).astype(jnp.int8) for i in range(32)], -2)
    return [codes.reshape(*codes.shape[:-2], -1)]


def _permute(x: jax.Array, spec: WeightSpec) -> _Rows:
    """Activations in the order of `_code_lanes`, zeros for the codes that fill the last words."""
    unit = 32 if 8 % spec.bits else 32 // spec.bits
    x = packing.pad_last(x, unit).reshape(x.shape[0], spec.groups, -1)
    sums = x.sum(-1, dtype=jnp.int32 if x.dtype == jnp.int8 else x.dtype)
    lanes = x.reshape(*x.shape[:-1], -1, _lanes(spec.bits))
    split = [lanes[..., j] for j in range(lanes.shape[-1])]
    joined = [lanes.swapaxes(-1, -2).reshape(x.shape)]
    return _Rows(joined if 8 % spec.bits else split, sums * jnp.asarray(spec.centre - _offset(spec.bits), sums.dtype))


def _lane(runs: UInt32[Array, "b *rows"], i: int, bits: int) -> UInt32[Array, "*rows"]:
    """Code i of every run of 32 codes, which fill `bits` words."""
    word, offset = divmod(i * bits, 32)
    code = runs[word] >> jnp.uint32(offset)
    if offset + bits > 32:
        code = code | (runs[word + 1] << jnp.uint32(32 - offset))
    return code & jnp.uint32(2**bits - 1)


def _lanes(bits: int) -> int:
    return 8 // bits if 8 % bits == 0 else 32


def _offset(bits: int) -> int:
    """What `_code_chunks` subtracts, so that 8 bits fit int8."""
    return 128 if bits == 8 else 0


def _aligned(spec: WeightSpec) -> bool:
    """Groups begin at words, and at runs of 32 codes for odd widths."""
    unit = 32 // spec.bits if 8 % spec.bits == 0 else 32
    return spec.groups == 1 or spec.group_size % unit == 0


def _two_rows(x: jax.Array) -> jax.Array:
    """At least two rows; by concatenation, since XLA moves a padding of the operand behind the product."""
    return x if x.shape[0] > 1 else jnp.concatenate([x, jnp.zeros_like(x)])


def _dot(x: jax.Array, w: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _group_dot(x: jax.Array, w: jax.Array, dtype) -> jax.Array:
    """[M, G, c] and [N, G, c] to [G, M, N]."""
    return lax.dot_general(x, w, (((2,), (2,)), ((1,), (1,))), preferred_element_type=dtype)
