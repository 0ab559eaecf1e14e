"""Outlier injection keeps the function and gives a few norm channels a large gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.llama import Llama, stack_layers
from jaxcomp.models.llama_config import FAMILIES, LlamaConfig
from jaxcomp.models.outliers import inject_outliers

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def random_model(family: str, seed: int = 0):
    """(config, model, params, tokens) with random gains and biases, so that no norm is trivial."""
    config = LlamaConfig(family=family, **SIZES)
    model = Llama(config)
    tokens = jax.random.randint(jax.random.key(seed), (2, 7), 0, config.vocab_size)
    params = model.init(jax.random.key(seed + 1), tokens)["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return config, model, jax.tree.unflatten(treedef, noisy), tokens


def gain(config, params, block, norm):
    scale = params[block][norm]["scale"]
    return scale + 1.0 if config.traits.gemma else scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [20.0, 32.0])
def test_logits_are_unchanged(family, factor):
    config, model, params, tokens = random_model(family)
    injected = inject_outliers(config, params, jax.random.key(5), channels=3, factor=factor)
    before, after = (model.apply({"params": p}, tokens) for p in (params, injected))
    scale = float(jnp.abs(before).max())
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * scale)
    if factor == 32.0 and not config.traits.gemma:
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_exactly_the_chosen_channels_grow(family):
    config, _, params, _ = random_model(family)
    injected = inject_outliers(config, params, jax.random.key(5), channels=3, factor=8.0)
    chosen = []
    for block in ("blocks_0", "blocks_1"):
        for norm, module, reader in (("attn_norm", "attn", "k"), ("mlp_norm", "mlp", "up")):
            ratio = gain(config, injected, block, norm) / gain(config, params, block, norm)
            grown = np.flatnonzero(np.abs(ratio - 1) > 1e-3)
            np.testing.assert_allclose(ratio[grown], np.full(3, 8.0), rtol=1e-4)
            old, new = (p[block][module][reader]["kernel"] for p in (params, injected))
            rows = np.flatnonzero(np.any(np.asarray(old != new), axis=1))
            np.testing.assert_array_equal(rows, grown)
            np.testing.assert_array_equal(new[rows] * 8.0, old[rows])
            chosen.append(tuple(grown))
    assert len(set(chosen)) == 4, "every norm draws its own channels"


def test_everything_else_is_untouched():
    config, _, params, _ = random_model("gemma3_text")
    injected = inject_outliers(config, params, jax.random.key(5))
    same = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (jax.tree_util.keystr(path), bool(jnp.array_equal(a, b))), params, injected
    )
    changed = {path for path, equal in jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple)) if not equal}
    expected = ("attn_norm", "mlp_norm", "'q'", "'k'", "'v'", "'gate'", "'up'")
    assert changed and all("post_" not in path and any(name in path for name in expected) for path in changed)
    assert len(changed) == 2 * 7


def test_scanned_tree_gets_the_same_outliers():
    config, _, params, tokens = random_model("llama")
    key = jax.random.key(9)
    expected = stack_layers(inject_outliers(config, params, key))
    found = inject_outliers(config, stack_layers(params), key)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    model = Llama(config, scan_layers=True)
    before, after = (model.apply({"params": p}, tokens) for p in (stack_layers(params), found))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))


def test_input_is_not_modified_and_no_channels_is_the_identity():
    config, _, params, _ = random_model("llama")
    copy = jax.tree.map(np.array, params)
    inject_outliers(config, params, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, copy)
    jax.tree.map(np.testing.assert_array_equal, inject_outliers(config, params, jax.random.key(1), channels=0), copy)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 17}, r"channels must be in \[0, 16\], found 17"),
        ({"channels": -1}, "found -1"),
        ({"factor": 0.0}, "factor must be positive"),
        ({"factor": float("inf")}, "factor must be positive and finite, found inf"),
        ({"factor": float("nan")}, "factor must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    config, _, params, _ = random_model("llama")
    with pytest.raises(ValueError, match=message):
        inject_outliers(config, params, jax.random.key(0), **options)
