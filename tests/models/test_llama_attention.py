"""Grouped-query attention against Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models import dot_product_attention


def test_attention_serves_a_flax_layer():
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    ours = nn.MultiHeadDotProductAttention(num_heads=3, attention_fn=dot_product_attention)
    theirs = nn.MultiHeadDotProductAttention(num_heads=3)
    variables = theirs.init(jax.random.key(1), x)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    np.testing.assert_allclose(ours.apply(variables, x, mask=mask), theirs.apply(variables, x, mask=mask), atol=2e-6)


def test_grouped_heads_equal_repeated_keys_without_repeating_them():
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 7, h, 4)) for i, h in enumerate((6, 2, 2)))
    bias = jax.random.normal(jax.random.key(3), (2, 6, 7, 7))
    repeat = lambda x: jnp.repeat(x, 3, axis=2)
    expected = nn.dot_product_attention(query, repeat(key), repeat(value), bias=bias)
    np.testing.assert_allclose(dot_product_attention(query, key, value, bias), expected, atol=2e-6)
    jaxpr = jax.make_jaxpr(dot_product_attention)(query, key, value)
    sizes = {eqn.primitive.name: eqn.outvars[0].aval.size for eqn in jaxpr.eqns}
    assert "gather" not in sizes and "concatenate" not in sizes
    with pytest.raises(ValueError, match="cannot share 4 key heads"):
        dot_product_attention(query, repeat(key)[:, :, :4], repeat(value)[:, :, :4])
