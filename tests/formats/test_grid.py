"""Quantization grids against the formulas, in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats.grid import Grid, decode, encode, fake_quantize, qparams

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 64)).astype(np.float32)


def reference(w, bits, levels, symmetric):
    """Row-wise min-max quantization, scalar by scalar."""
    n = (levels or 2**bits) - 1
    out = np.empty_like(w)
    for r, row in enumerate(w):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        if symmetric:
            scale = np.float32(max(high, -low) / (n // 2))
            zero = (n + 1) // 2
        else:
            scale = np.float32((high - low) / n)
            zero = np.clip(np.round(-low / scale), 0, n)
        out[r] = (np.clip(np.round(row / scale) + zero, 0, n) - zero) * scale
    return out


@pytest.mark.parametrize("bits,levels", [(2, 0), (3, 0), (4, 0), (8, 0), (3, 5), (4, 11)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_reference(bits, levels, symmetric):
    grid = Grid(bits, levels, symmetric)
    scale, zero = qparams(W, grid)
    got = decode(encode(W, scale, zero, grid), scale, zero)
    np.testing.assert_allclose(got, reference(W, bits, levels, symmetric), atol=1e-6)


def test_groups_are_quantized_apart():
    grid = Grid(4, group_size=16)
    scale, zero = qparams(W, grid)
    assert scale.shape == zero.shape == (6, 4)
    got = decode(encode(W, scale, zero, grid), scale, zero)
    np.testing.assert_allclose(got, reference(W.reshape(-1, 16), 4, 0, True).reshape(W.shape), atol=1e-6)


def test_per_tensor_has_one_scale():
    scale, _ = qparams(W, Grid(8, group_size=-1))
    assert scale.shape == (1, 1) and np.isclose(scale[0, 0], np.abs(W).max() / 127)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("row", [np.zeros(8), np.full(8, 3.0), np.full(8, -0.25), np.linspace(1, 2, 8)])
def test_zero_is_exact_and_constant_rows_survive(row, symmetric):
    w = jnp.asarray(row, jnp.float32)[None]
    grid = Grid(4, symmetric=symmetric)
    scale, zero = qparams(w, grid)
    assert ((zero >= 0) & (zero < 16)).all()
    np.testing.assert_allclose(decode(encode(w, scale, zero, grid), scale, zero), w, atol=float(scale.max()) / 2 + 1e-6)
    assert decode(encode(0 * w, scale, zero, grid), scale, zero).tolist() == (0 * w).tolist()


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_equals_decode_of_encode(symmetric):
    grid = Grid(3, symmetric=symmetric, group_size=32)
    scale, zero = qparams(W, grid)
    np.testing.assert_allclose(
        fake_quantize(jnp.asarray(W), scale, zero, grid), decode(encode(W, scale, zero, grid), scale, zero), atol=1e-6
    )


def test_straight_through_gradient_is_one_inside_and_zero_outside():
    grid, scale, zero = Grid(4), jnp.full((1, 1), 0.1), jnp.full((1, 1), 8.0)
    w = jnp.array([[0.33, -0.2, 5.0, -5.0]])
    grad = jax.grad(lambda w: fake_quantize(w, scale, zero, grid).sum())(w)
    np.testing.assert_allclose(grad, [[1, 1, 0, 0]])


def test_learned_clipping_shrinks_the_range():
    low = high = jnp.full((6, 1), 0.5)
    full, clipped = (qparams(W, Grid(4, symmetric=False), *c)[0] for c in ((), (low, high)))
    np.testing.assert_allclose(clipped, full / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"bits": 0}, "1..8"),
        ({"bits": 9}, "1..8"),
        ({"bits": 3, "levels": 9}, "2..8"),
        ({"bits": 1}, "symmetric=False"),
        ({"bits": 4, "group_size": -2}, "group_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**options)


def test_group_that_does_not_divide_names_a_remedy():
    with pytest.raises(ValueError, match="group_size=25 or 0"):
        Grid(4, group_size=30).groups(100)
