"""Bit packing against an independent bit-string implementation, for every width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats.packing import pack, packed_words, unpack


def bit_string(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row packed through a Python integer: code i at bit i * bits."""
    value = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return np.array([(value >> (32 * w)) & 0xFFFFFFFF for w in range(words)], np.uint32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 7, 31, 32, 33, 64, 100])
def test_matches_bit_string_and_round_trips(bits, k):
    codes = np.random.default_rng(bits * k).integers(0, 2**bits, (3, k)).astype(np.uint8)
    words = jax.jit(pack, static_argnums=1)(codes, bits)
    np.testing.assert_array_equal(words, np.stack([bit_string(row, bits) for row in codes]))
    np.testing.assert_array_equal(unpack(words, bits, k), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_32_codes_fill_exactly_b_words(bits):
    assert packed_words(32, bits) == bits
    assert pack(jnp.zeros((2, 64), jnp.uint8), bits).nbytes == 2 * 64 * bits // 8


def test_leading_axes():
    codes = jnp.arange(2 * 3 * 40, dtype=jnp.uint8).reshape(2, 3, 40) % 8
    np.testing.assert_array_equal(unpack(pack(codes, 3), 3, 40), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"1\.\.8"):
        pack(jnp.zeros((1, 4), jnp.uint8), bits)


def test_wrong_word_count():
    with pytest.raises(ValueError, match="fill 3 words"):
        unpack(jnp.zeros((1, 4), jnp.uint32), 3, 32)
