"""Bit-plane products against NumPy integers for all widths at once; the corrected epilogue against decoded floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arbitrary_bit_matmul import packing, reference
from pallas_kernels.arbitrary_bit_matmul.activation import join_digits, quantize_activations, split_digits

M, N, K = 3, 5, 45


def interpret(codes, bits, signed):
    """Integers that b-bit codes stand for, as int64."""
    codes = codes.astype(np.int64)
    return np.where(signed & (codes >> (bits - 1) == 1), codes - (1 << bits), codes)


def padded_coefficients(bits, signed):
    return np.pad(np.asarray(reference.plane_coefficients(bits, signed)), (0, 8 - bits))


def test_every_pair_of_widths_signed_and_unsigned():
    """All 8 x 8 x 2 x 2 products in one call: planes beyond the width count zero."""
    rng = np.random.default_rng(0)
    cases = [(p, q, sx, sw) for p in range(1, 9) for q in range(1, 9) for sx in (False, True) for sw in (False, True)]
    x = np.stack([rng.integers(0, 2**p, (M, K)) for p, *_ in cases]).astype(np.uint8)
    w = np.stack([rng.integers(0, 2**q, (N, K)) for _, q, *_ in cases]).astype(np.uint8)
    cx = np.stack([padded_coefficients(p, sx) for p, _, sx, _ in cases])
    cw = np.stack([padded_coefficients(q, sw) for _, q, _, sw in cases])
    planes = lambda c: packing.pack_planes(c, 8).swapaxes(0, 1)
    got = jax.jit(jax.vmap(reference.plane_product))(planes(x), planes(w), cx, cw)
    for y, xi, wi, (p, q, sx, sw) in zip(got, x, w, cases, strict=True):
        np.testing.assert_array_equal(
            y, interpret(xi, p, sx) @ interpret(wi, q, sw).T, err_msg=f"{p=} {q=} {sx=} {sw=}"
        )


def test_signed_one_bit_is_minus_one():
    np.testing.assert_array_equal(reference.plane_coefficients(1, signed=True), [-1])


@pytest.mark.parametrize(("p", "q", "groups"), [(8, 4, 1), (4, 3, 9), (1, 1, 5)])
def test_epilogue_equals_product_of_decoded_values(p, q, groups):
    rng = np.random.default_rng(p * q)
    x = jnp.asarray(rng.standard_normal((M, K)), jnp.float32)
    qw = rng.integers(0, 2**q, (N, K)).astype(np.uint8)
    scale = jnp.asarray(rng.random((N, groups)) + 0.1, jnp.float32)
    zero = jnp.asarray(rng.integers(0, 2**q, (N, groups)), jnp.float32)
    act = quantize_activations(x, p, symmetric=False)
    half = 2 ** (p - 1)
    qx = (act.codes.astype(jnp.int32) + half).astype(jnp.uint8)
    products = jax.jit(reference.grouped_plane_product, static_argnums=(2, 3, 4))(qx, qw, p, q, groups)
    y = reference.epilogue(products, qx, act.scale, act.zero + half, qw, scale, zero)
    want = np.asarray(act.values(), np.float64) @ np.asarray(reference.decode(qw, scale, zero), np.float64).T
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_error_is_half_a_step(bits, symmetric):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 33)) + 0.5, jnp.float32)
    act = quantize_activations(x, bits, symmetric)
    assert np.all(np.abs(act.values() - x) <= 0.5001 * act.scale)


def test_activation_scales_of_zero_rows_decode_to_zero():
    for symmetric in (True, False):
        assert not np.any(quantize_activations(jnp.zeros((1, 4)), 8, symmetric).values())


def test_one_bit_symmetric_activations_are_refused():
    with pytest.raises(ValueError, match="act_symmetric=False"):
        quantize_activations(jnp.ones((1, 4)), 1)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_digits_reach_the_stated_precision(digits):
    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32) * 7
    codes, scales = split_digits(jnp.asarray(x), digits)
    error = np.abs(join_digits(codes.astype(jnp.float32), scales) - x).max(-1)
    assert np.all(error <= np.abs(x).max(-1) * max(254.0**-digits, 2.0**-23))
