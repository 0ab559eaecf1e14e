"""Layouts against independent bit strings, and exact ways back, for every width and ragged sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arbitrary_bit_matmul import five_levels, packing

WIDTHS = range(1, 9)


def codes_of(bits, shape=(3, 45), seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


def bit_string(codes, bits):
    """One row packed through a Python integer: code i at bit i * bits."""
    value = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    return np.array([value >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))], np.uint32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_dense_is_a_bit_string(bits):
    codes = codes_of(bits)
    words = packing.pack_dense(codes, bits)
    np.testing.assert_array_equal(words, [bit_string(row, bits) for row in codes])
    np.testing.assert_array_equal(packing.unpack_dense(words, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_are_bit_strings_of_single_bits(bits):
    codes = codes_of(bits)
    planes = packing.pack_planes(codes, bits)
    want = [[bit_string(row >> p & 1, 1) for row in codes] for p in range(bits)]
    np.testing.assert_array_equal(planes, want)
    np.testing.assert_array_equal(packing.unpack_planes(planes, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_split_lanes(bits):
    codes = codes_of(bits, (2, 3, 19))
    split = packing.pack_split(codes, bits)
    lanes = packing.lanes(bits)
    assert split.shape == (2, 3, -(-19 // lanes))
    np.testing.assert_array_equal(split[..., 0] & (2 ** (8 // lanes) - 1), codes[..., 0])
    np.testing.assert_array_equal(packing.unpack_split(split, bits, 19), codes)


def test_half_split_nibbles():
    split = packing.pack_split(jnp.arange(6, dtype=jnp.uint8), 4)
    np.testing.assert_array_equal(split, [0 | 3 << 4, 1 | 4 << 4, 2 | 5 << 4])


@pytest.mark.parametrize("k", [1, 2, 3, 127, 128, 129])
def test_base5_round_trip_and_bytes(k):
    codes = np.random.default_rng(k).integers(0, 5, (4, k)).astype(np.uint8)
    words = jax.jit(five_levels.pack_base5)(codes)
    assert words.shape[-1] == -(--(-k // 3) * 7 // 32)
    np.testing.assert_array_equal(five_levels.unpack_base5(words, k), codes)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_sparse_third_plane(share):
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((5, 70)) < share, 4, rng.integers(0, 4, (5, 70))).astype(np.uint8)
    sparse = five_levels.pack_sparse(codes)
    np.testing.assert_array_equal(five_levels.unpack_sparse(sparse, 70), codes)
    x = jnp.asarray(rng.integers(-9, 9, (3, 70)), jnp.int32)
    low = packing.unpack_dense(sparse.low, 2, 70).astype(np.int32)
    product = x @ low.T + five_levels.sparse_plane_product(x, sparse)
    np.testing.assert_array_equal(product, np.asarray(x) @ codes.astype(np.int32).T)


def test_third_plane_of_five_levels_excludes_the_others():
    planes = packing.pack_planes(np.arange(5, dtype=np.uint8)[None], 3)
    assert int((planes[2] & (planes[0] | planes[1])).sum()) == 0


def test_storage_bits():
    codes = np.random.default_rng(0).integers(0, 4, (8, 672)).astype(np.uint8)
    codes[:, :21] = 4
    bits = five_levels.storage_bits(codes)
    assert bits == pytest.approx({"planes": 3, "base5": 7 / 3, "sparse": 2 + 16 * 21 / 672})


def test_sparse_plane_refuses_columns_beyond_uint16():
    with pytest.raises(ValueError, match="65536"):
        five_levels.pack_sparse(np.zeros((1, 65536), np.uint8))


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"1\.\.8, found {bits}"):
        packing.pack_dense(np.zeros((1, 4), np.uint8), bits)


def test_wrong_word_count():
    with pytest.raises(ValueError, match="fill 3 words, found 4"):
        packing.unpack_dense(jnp.zeros((1, 4), jnp.uint32), 3, 32)
