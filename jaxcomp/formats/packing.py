"""Dense bit packing: b-bit unsigned codes in uint32 words, for every b in 1..8.

A row of K codes is one little-endian bit string: code i occupies bits [i b, (i + 1) b), word w holds bits [32 w, 32 w + 32). 32
codes fill exactly b words and a row ends after ceil(K b / 32) words. This is the `pack-quantized` layout of compressed-tensors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32


def packed_words(k: int, bits: int) -> int:
    """Words of a packed row of k codes: ceil(k * bits / 32)."""
    return -(-k * bits // 32)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def pack(codes: UInt8[Array, "*rows k"], bits: int) -> UInt32[Array, "*rows words"]:
    """Packs unsigned codes < 2**bits along the last axis.

    Raises:
      ValueError: bits outside 1..8.
    """
    _check_bits(bits)
    *rows, k = codes.shape
    groups = -(-k // 32)
    padded = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * len(rows) + [(0, groups * 32 - k)])
    lanes = padded.reshape(*rows, groups, 32)
    words = [jnp.zeros((*rows, groups), jnp.uint32) for _ in range(bits)]
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        words[word] = words[word] | (lanes[..., i] << offset)
        if offset + bits > 32:
            words[word + 1] = words[word + 1] | (lanes[..., i] >> (32 - offset))
    return jnp.stack(words, -1).reshape(*rows, groups * bits)[..., : packed_words(k, bits)]


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def unpack(words: UInt32[Array, "*rows words"], bits: int, k: int) -> UInt8[Array, "*rows k"]:
    """The inverse of `pack`; k is the number of codes of a row.

    Raises:
      ValueError: bits outside 1..8, or a word count that does not fit k.
    """
    _check_bits(bits)
    *rows, width = words.shape
    if width != packed_words(k, bits):
        raise ValueError(f"{k} codes of {bits} bits fill {packed_words(k, bits)} words, got {width}")
    mask = jnp.uint32(2**bits - 1)
    if 32 % bits == 0:  # no code straddles two words
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32).reshape((1,) * words.ndim + (-1,))
        return ((words[..., None] >> shifts) & mask).astype(jnp.uint8).reshape(*rows, -1)[..., :k]
    groups = -(-k // 32)
    padded = jnp.pad(words, [(0, 0)] * len(rows) + [(0, groups * bits - width)]).reshape(*rows, groups, bits)
    return (
        jnp.stack([_lane(padded, i, bits) & mask for i in range(32)], -1).astype(jnp.uint8).reshape(*rows, -1)[..., :k]
    )


def _lane(words: jax.Array, i: int, bits: int) -> jax.Array:
    word, offset = divmod(i * bits, 32)
    low = words[..., word] >> offset
    return low | (words[..., word + 1] << (32 - offset)) if offset + bits > 32 else low


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")
