"""The core product in plain XLA: the default everywhere, and fast on CPU where the obvious forms are not.

A dense row is read as it lies. The codes at one bit offset of all bytes (for odd widths: of all runs of 32 codes) form a lane;
a shift and a mask bring them to int8, and it is the few activations that are permuted to meet them, never the weights. XLA on
CPU expands both operands of a one-row product to float32 but reads int8 as it is from two rows on, so rows are padded, and
weights are expanded in blocks that stay in cache. Few floating-point rows enter as three int8 digits each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, UInt32

from pallas_kernels.arbitrary_bit_matmul import packing
from pallas_kernels.arbitrary_bit_matmul.activation import join_digits, split_digits
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, WeightSpec

BLOCK_BYTES = 1 << 19  # expanded weights of a block, which has to stay in the second-level cache
DIGIT_ROWS = 4  # up to this many floating-point rows, digits beat float32 weights
LANE_CODES = 64  # a lane of a group has to be this long for the same


def matmul(x: jax.Array, words: UInt32[Array, "n w"], scale: Float[Array, "n g"], spec: WeightSpec) -> jax.Array:
    """See `spec.Backend`."""
    if not _aligned(spec):
        return _batched(x, words, scale, spec)
    if x.dtype == jnp.int8:
        cpu, other = _integer, _batched if spec.groups > 1 else _integer_rows
    else:
        few = x.shape[0] <= DIGIT_ROWS and (spec.groups == 1 or spec.group_size // _lanes(spec.bits) >= LANE_CODES)
        cpu, other = _digits if few else _floating, _floating_rows
    bind = lambda f: lambda *args: f(*args, spec)
    return lax.platform_dependent(x, words, scale, cpu=bind(cpu), default=bind(other))


BACKEND = Backend("xla", lambda spec: "dense", lambda spec, x: None, matmul)


def _integer(x, words, scale, spec):
    """Exact int8 product: row blocks with one scale per row, a scan over groups otherwise."""
    m, x = x.shape[0], _two_rows(x)
    if spec.groups > 1:
        return _group_scan(x, words, scale, spec)[:m]
    rows = lambda words, scale: _integer_rows(x, words, scale, spec)
    return _by_row_blocks(rows, (words, scale), spec, itemsize=1)[:m]


def _integer_rows(x, words, scale, spec):
    return _chunk_product(x, words, spec).astype(jnp.float32) * scale[:, 0][None]


def _group_scan(x, words, scale, spec):
    """sum_g s_g d_g, one group of all rows at a time: groups are strided slices of the dense rows."""
    words = words.reshape(words.shape[0], spec.groups, -1)
    x = x.reshape(x.shape[0], spec.groups, -1)

    def add_group(total, g):
        take = lambda a: lax.dynamic_index_in_dim(a, g, 1, keepdims=False)
        return total + _chunk_product(take(x), take(words), spec).astype(jnp.float32) * take(scale)[None], None

    return lax.scan(add_group, jnp.zeros((x.shape[0], words.shape[0]), jnp.float32), jnp.arange(spec.groups))[0]


def _chunk_product(x: Int8[Array, "m k"], words: UInt32[Array, "n w"], spec: WeightSpec) -> Int32[Array, "m n"]:
    """x (u - centre)^T of dense rows without groups."""
    x, words = _fill(x, words, spec.bits)
    pairs = zip(_activation_chunks(x, spec.bits), _code_chunks(words, spec.bits), strict=True)
    product = sum(_dot(a, w, jnp.int32) for a, w in pairs)
    return product - (spec.centre - _offset(spec.bits)) * x.astype(jnp.int32).sum(-1, keepdims=True)


def _digits(x, words, scale, spec):
    """Floating-point rows through the integer product of their digits: exact but for 2^-24 of a row's maximum."""
    digits, scales = split_digits(x.astype(jnp.float32))
    y = _integer(digits.reshape(-1, x.shape[1]), words, scale, spec)
    return join_digits(y.reshape(*digits.shape[:2], -1), scales)


def _floating(x, words, scale, spec):
    m, x = x.shape[0], _two_rows(x.astype(jnp.float32))
    rows = lambda words, scale: _floating_rows(x, words, scale, spec)
    return _by_row_blocks(rows, (words, scale), spec, itemsize=4)[:m]


def _floating_rows(x, words, scale, spec):
    """Weights expanded in the dtype of x, scales and all; float32 accumulation."""
    x, words = _fill(x, words, spec.bits)
    grouped = lambda a: a.reshape(a.shape[0], spec.groups, -1)
    shift = spec.centre - _offset(spec.bits)
    value = lambda w: ((w.astype(jnp.float32) - shift) * scale[..., None]).astype(x.dtype)
    pairs = zip(_activation_chunks(grouped(x), spec.bits), _code_chunks(grouped(words), spec.bits), strict=True)
    flat = lambda a: a.reshape(a.shape[0], -1)
    return sum(_dot(flat(a), flat(value(w)), jnp.float32) for a, w in pairs)


def _batched(x, words, scale, spec):
    """Any group size: one product per group, exact for integers; weights are expanded whole."""
    codes = packing.unpack_dense(words, spec.bits, spec.k).astype(jnp.int32) - spec.centre
    grouped = lambda a: a.reshape(a.shape[0], spec.groups, -1)
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    batch = (((2,), (2,)), ((1,), (1,)))
    d = lax.dot_general(grouped(x), grouped(codes.astype(x.dtype)), batch, preferred_element_type=dtype)
    return (d.astype(jnp.float32) * scale.T[:, None]).sum(0)


def _by_row_blocks(product, operands, spec, itemsize):
    """product(*operands) [M, N], a block of rows of the operands after the other; all at once where they fit one block."""
    n, rows = spec.n, max(8, BLOCK_BYTES // (spec.k * itemsize))
    whole = n // rows * rows
    if n <= rows:
        return product(*operands)
    blocks = lax.map(lambda b: product(*b), [a[:whole].reshape(n // rows, rows, -1) for a in operands])
    y = blocks.transpose(1, 0, 2).reshape(-1, whole)
    return y if whole == n else jnp.concatenate([y, product(*[a[whole:] for a in operands])], 1)


def _code_chunks(words: UInt32[Array, "*rows w"], bits: int) -> list[Int8[Array, "*rows c"]]:
    """Codes minus `_offset` as int8, in an order that `_activation_chunks` shares."""
    if bits == 8:
        return [lax.bitcast_convert_type(packing.words_to_bytes(words) ^ jnp.uint8(128), jnp.int8)]
    if 8 % bits == 0:
        return [c.astype(jnp.int8) for c in packing.byte_lanes(packing.words_to_bytes(words), _lanes(bits))]
    runs = jnp.moveaxis(words.reshape(*words.shape[:-1], -1, bits), -1, 0)
    codes = jnp.stack([_lane(runs, i, bits).astype(jnp.int8) for i in range(32)], -2)
    return [codes.reshape(*codes.shape[:-2], -1)]


def _activation_chunks(x: jax.Array, bits: int) -> list[jax.Array]:
    lanes = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, _lanes(bits)), -1, 0)
    return list(lanes) if 8 % bits == 0 else [jnp.moveaxis(lanes, 0, -2).reshape(x.shape)]


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


def _fill(x, words, bits):
    """Zero activations for the codes of the last words; for odd widths, zero words up to a full run of codes."""
    words = words if 8 % bits == 0 else packing.pad_last(words, bits)
    return jnp.pad(x, ((0, 0), (0, words.shape[-1] * 32 // bits - x.shape[-1]))), words


def _two_rows(x: jax.Array) -> jax.Array:
    return x if x.shape[0] > 1 else jnp.pad(x, ((0, 1), (0, 0)))


def _dot(x: jax.Array, w: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
