"""SmoothQuant: the formula, the function, and the ranges that it leaves."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.core.transform import compress
from jaxcomp.quantize import smoothquant
from jaxcomp.quantize.smoothquant import smoothing_scale


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scale_follows_the_formula_over_all_consumers(alpha):
    rng = np.random.default_rng(0)
    max_abs = np.exp(rng.normal(size=6)).astype(np.float32)
    max_abs[2] = 1e-12
    weights = [rng.normal(size=(n, 6)).astype(np.float32) for n in (3, 5)]
    weights[0][:, 4] = weights[1][:, 4] = 0
    w_max = np.maximum(np.abs(np.concatenate(weights)).max(0), 1e-5)
    want = np.maximum(max_abs**alpha / w_max ** (1 - alpha), 1e-5)
    np.testing.assert_allclose(smoothing_scale(max_abs, [jnp.asarray(w) for w in weights], alpha), want, rtol=1e-5)


@pytest.fixture(scope="module")
def smoothed(toy):
    return compress(smoothquant(0.5), toy.params, toy.data)[0]


def test_outputs_are_unchanged(toy, smoothed):
    want = toy.apply(toy.params, toy.x)
    np.testing.assert_allclose(toy.apply(smoothed, toy.x), want, atol=1e-5 * float(jnp.abs(want).max()))


def test_half_of_the_difficulty_moves_to_the_weights(toy, smoothed):
    """At alpha = 0.5 the largest input and the largest weight of every channel become equal."""
    stats = toy.data(smoothed, {"max_abs"})
    leaves = leaves_with_paths(smoothed)
    for block in ("blocks_0", "blocks_1"):
        for names in (("attn/q", "attn/k", "attn/v"), ("mlp/gate", "mlp/up")):
            paths = [f"{block}/{name}/kernel" for name in names]
            w_max = jnp.max(jnp.stack([jnp.abs(leaves[p]).max(1) for p in paths]), 0)
            np.testing.assert_allclose(stats[paths[0]]["max_abs"], w_max, rtol=1e-3)


def test_only_norms_and_their_consumers_change(toy, smoothed):
    old, new = leaves_with_paths(toy.params), leaves_with_paths(smoothed)
    changed = {path for path in old if not jnp.array_equal(old[path], new[path])}
    names = (
        "attn_norm/scale",
        "mlp_norm/scale",
        *(f"{n}/kernel" for n in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up")),
    )
    assert changed == {f"blocks_{i}/{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        smoothquant(alpha)
