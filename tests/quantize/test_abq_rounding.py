"""Pieces of learned rounding: straight-through grids, bit balance, clipping, compensation, attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats import ActivationQuantizer, Grid
from jaxcomp.formats import grid as formats_grid
from jaxcomp.models import dot_product_attention
from jaxcomp.quantize.attention import attention_map, quantized_attention
from jaxcomp.quantize.lwc import clip_logits, clipped, compensated_blocks, compensation
from jaxcomp.quantize.straight_through import balanced, fake, qparams

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(6, 8)) + 0.3, jnp.float32)
GRIDS = [
    Grid(3, symmetric=False),
    Grid(3, levels=5, symmetric=False, group_size=4),
    Grid(4, symmetric=True),
    Grid(2, symmetric=False, group_size=-1),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scale_and_zero_are_those_of_the_formats(grid):
    low, high = (
        jnp.asarray(RNG.uniform(0.5, 1, formats_grid.qparams(W, grid)[0].shape), jnp.float32) for _ in range(2)
    )
    for args in ((), (low, high)):
        for found, want in zip(qparams(W, grid, *args), formats_grid.qparams(W, grid, *args), strict=True):
            np.testing.assert_array_equal(found, want)
    for shifted in (W + 5, W - 5, 0 * W):  # ranges that miss zero, and an empty one
        np.testing.assert_array_equal(qparams(shifted, grid)[1], formats_grid.qparams(shifted, grid)[1])


def test_rounding_per_token_is_the_activation_quantizers():
    x = W.astype(jnp.bfloat16)
    grid = Grid(4, symmetric=False)
    assert fake(x, grid).dtype == jnp.bfloat16
    np.testing.assert_array_equal(fake(x, grid), ActivationQuantizer(grid).fake(x))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compiled_gradient_is_finite_and_the_eager_one(grid):
    """Compiled sums of products are not reproducible to the bit: gradients of extremes must not depend on it."""
    kernel, a, b, g = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((32, 16), 16, 32, (16, 32)))
    logits = clip_logits((16, 32), grid, 1.0)

    def loss(scales, a, b):
        matrix, scale, zero = clipped(kernel * scales[:, None], grid, logits, {"a": a, "b": b})
        return jnp.sum(formats_grid.fake_quantize(matrix, scale, zero, grid) * g)

    args = jnp.exp(0.1 * b), 0.1 * a, b
    eager, compiled = (fn(*args) for fn in (jax.grad(loss, (0, 1, 2)), jax.jit(jax.grad(loss, (0, 1, 2)))))
    for want, found in zip(eager, compiled, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


def test_balance_adds_a_level_to_one_and_two_bits_only():
    assert [balanced(Grid(b, symmetric=False)).count for b in (1, 2, 3, 8)] == [3, 5, 8, 256]
    assert [balanced(Grid(b, symmetric=False)).bits for b in (1, 2, 3, 8)] == [2, 3, 3, 8]
    kept = balanced(Grid(2, group_size=8))
    assert kept.symmetric and kept.group_size == 8
    assert balanced(kept) == kept


def test_clipping_starts_at_the_authors_factor_and_follows_its_logits():
    grid = Grid(3, symmetric=False, group_size=4)
    logits = clip_logits((6, 8), grid, 4.0)
    assert logits.shape == (6, 2, 2)
    _, scale, _ = clipped(W.T, grid, logits, None)
    np.testing.assert_allclose(scale, qparams(W, grid)[0] * 0.98201, rtol=1e-4)
    half = clipped(W.T, grid, logits.at[..., 1].set(0.0), None)[1]  # sigmoid(0): half the maximum
    grouped = np.asarray(W, np.float64).reshape(6, 2, 4)
    want = (0.5 * np.maximum(grouped.max(-1), 0) - 0.98201 * np.minimum(grouped.min(-1), 0)) / 7
    np.testing.assert_allclose(half, want, rtol=1e-4)


def test_compensation_starts_at_nothing_and_then_is_a_rank_one_term():
    grid, logits = Grid(2, symmetric=False), clip_logits((6, 8), Grid(2, symmetric=False), 4.0)
    start = clipped(W.T, grid, logits, compensation((6, 8)))
    for found, want in zip(start, clipped(W.T, grid, logits, None), strict=True):
        np.testing.assert_array_equal(found, want)
    a, b = (jnp.asarray(RNG.normal(size=n), jnp.float32) for n in (6, 8))
    np.testing.assert_allclose(clipped(W.T, grid, logits, {"a": a, "b": b})[0], W + jnp.outer(a, b), rtol=1e-5)


EDGES = {
    1: {0},
    2: {0, 1},
    6: {0, 4, 5},
    12: {0, 1, 8, 9, 10, 11},
    13: {0, 1, 2, 9, 10, 11, 12},
    32: {0, 1, 2, 28, 29, 30, 31},
}


@pytest.mark.parametrize("layers", EDGES)
def test_compensated_blocks_are_the_papers_from_thirteen_layers_on(layers):
    assert compensated_blocks(layers) == EDGES[layers]
    assert compensated_blocks(layers, 0, 0) == set()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_map_is_what_attention_applies_to_values(softcap):
    """With one-hot values the output of attention is its probabilities."""
    query, key = (jnp.asarray(RNG.normal(size=(2, 8, heads, 8)) * 2, jnp.float32) for heads in (4, 2))
    mask = jnp.tri(8, dtype=bool)[None, None]
    value = jnp.broadcast_to(jnp.eye(8)[None, :, None], key.shape)
    want = dot_product_attention(query, key, value, mask=mask, softcap=softcap).mean(2)
    found = attention_map(query, key, mask, softcap)
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert float(jnp.abs(jnp.where(mask[0], 0, found)).max()) == 0


def test_attention_rounds_queries_keys_and_values_per_token_and_head():
    seen = []

    def spy(query, key, value, **options):
        seen.append((query, key, value, options))
        return query

    inputs = [jnp.asarray(RNG.normal(size=(1, 3, heads, 16)), jnp.float32) for heads in (4, 2, 2)]
    quantized_attention(2, attention_fn=spy)(*inputs, mask=None)
    quantized_attention(2, balance=True, attention_fn=spy)(*inputs, mask=None)
    assert seen[0][3] == {"mask": None}
    for rounded, levels in zip(seen, (4, 5), strict=True):
        for x, y in zip(inputs, rounded[:3], strict=True):
            rows = np.asarray(y).reshape(-1, 16)
            assert max(len(np.unique(row)) for row in rows) == levels
            assert np.abs(y - x).max() <= (np.ptp(np.asarray(x), axis=-1).max() + 1e-6) / (levels - 1)
    assert quantized_attention(16) is dot_product_attention
