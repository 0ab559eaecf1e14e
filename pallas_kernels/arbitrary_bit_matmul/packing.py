"""Layouts of b-bit unsigned codes, b in 1..8, and the exact ways between them.

`dense` is canonical: a row of K codes is one little-endian bit string, code i at bits [i b, (i + 1) b), in uint32 words; a row
ends after ceil(K b / 32) words (the `pack-quantized` layout of compressed-tensors). All others are derived from codes:

  planes   uint32 [b, *rows, ceil(K / 32)]: bit plane p outermost, bit i of word w is bit p of code 32 w + i (ABQ-LLM engine)
  split    uint8 [*rows, ceil(K / L)], L = 8 // c lanes of c = 1, 2, 4 or 8 >= b bits: lane j holds codes [j K/L, (j + 1) K/L)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8, UInt32


def dense_words(k: int, bits: int) -> int:
    """Words of a dense row of k codes: ceil(k * bits / 32)."""
    return -(-k * bits // 32)


@functools.partial(jax.jit, static_argnames=("bits",))
def pack_dense(codes: UInt8[Array, "*rows k"], bits: int) -> UInt32[Array, "*rows words"]:
    """Dense words of codes < 2**bits. Raises ValueError for bits outside 1..8."""
    return _bits_to_words(code_bits(codes, bits).reshape(*codes.shape[:-1], -1))


@functools.partial(jax.jit, static_argnames=("bits", "k"))
def unpack_dense(words: UInt32[Array, "*rows words"], bits: int, k: int) -> UInt8[Array, "*rows k"]:
    """Codes of dense words. Raises ValueError for bits outside 1..8, or a word count that does not fit k."""
    check_bits(bits)
    if words.shape[-1] != dense_words(k, bits):
        raise ValueError(f"{k} codes of {bits} bits fill {dense_words(k, bits)} words, found {words.shape[-1]}")
    return bits_to_codes(_words_to_bits(words, k * bits).reshape(*words.shape[:-1], k, bits))


@functools.partial(jax.jit, static_argnames=("bits",))
def pack_planes(codes: UInt8[Array, "*rows k"], bits: int) -> UInt32[Array, "b *rows words"]:
    """Bit planes of codes < 2**bits, plane outermost."""
    return _bits_to_words(jnp.moveaxis(code_bits(codes, bits), -1, 0))


@functools.partial(jax.jit, static_argnames=("k",))
def unpack_planes(planes: UInt32[Array, "b *rows words"], k: int) -> UInt8[Array, "*rows k"]:
    """Codes of bit planes; their number is the leading size."""
    return bits_to_codes(jnp.moveaxis(_words_to_bits(planes, k), 0, -1))


def lanes(bits: int) -> int:
    """Codes per byte of the smallest power-of-two container that holds `bits` bits."""
    check_bits(bits)
    return 8 // next(c for c in (1, 2, 4, 8) if c >= bits)


def pack_split(codes: UInt8[Array, "*rows k"], bits: int) -> UInt8[Array, "*rows k_l"]:
    """Half-split nibbles and their like (quarter-split crumbs, ...): byte i = OR_j codes[j ceil(K/L) + i] << (j 8/L)."""
    n = lanes(bits)
    parts = jnp.split(pad_last(codes, n), n, axis=-1)
    return sum((p << jnp.uint8(j * 8 // n) for j, p in enumerate(parts)), jnp.zeros_like(parts[0]))


def unpack_split(split: UInt8[Array, "*rows k_l"], bits: int, k: int) -> UInt8[Array, "*rows k"]:
    """Codes of half-split nibbles and their like."""
    return jnp.concatenate(byte_lanes(split, lanes(bits)), -1)[..., :k]


def byte_lanes(data: UInt8[Array, "*rows n"], count: int) -> list[UInt8[Array, "*rows n"]]:
    """The `count` equal bit fields of every byte, lowest first."""
    width = 8 // count
    mask = jnp.uint8(2**width - 1)
    return [(data >> jnp.uint8(j * width)) & mask for j in range(count)]


def words_to_bytes(words: UInt32[Array, "*rows n"]) -> UInt8[Array, "*rows 4n"]:
    """The bytes of words, least significant first."""
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)


def bytes_to_words(data: UInt8[Array, "*rows n"]) -> UInt32[Array, "*rows words"]:
    """Words of bytes, least significant first; the last word is filled with zeros."""
    data = pad_last(data, 4)
    return lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, 4), jnp.uint32)


def code_bits(codes: UInt8[Array, "*rows k"], bits: int) -> UInt8[Array, "*rows k b"]:
    """Bits of every code, 0 or 1, lowest first."""
    check_bits(bits)
    shifts = jnp.arange(bits, dtype=jnp.uint8).reshape((1,) * codes.ndim + (-1,))
    return (codes[..., None] >> shifts) & jnp.uint8(1)


def bits_to_codes(bits: UInt8[Array, "*rows k b"]) -> UInt8[Array, "*rows k"]:
    """Codes of bits, lowest first."""
    shifts = jnp.arange(bits.shape[-1], dtype=jnp.uint8).reshape((1,) * (bits.ndim - 1) + (-1,))
    return (bits << shifts).sum(-1, dtype=jnp.uint8)


def pad_last(a: jax.Array, multiple: int) -> jax.Array:
    """Pads the last axis with zeros to a multiple."""
    extra = -a.shape[-1] % multiple
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, extra)]) if extra else a


def check_bits(bits: int) -> None:
    """Raises ValueError for bits outside 1..8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, found {bits}")


def _bits_to_words(bits: UInt8[Array, "*rows n"]) -> UInt32[Array, "*rows words"]:
    return bytes_to_words(jnp.packbits(bits, axis=-1, bitorder="little"))


def _words_to_bits(words: UInt32[Array, "*rows words"], n: int) -> UInt8[Array, "*rows n"]:
    return jnp.unpackbits(words_to_bytes(words), axis=-1, bitorder="little")[..., :n]
