"""The decoder agrees with itself: cached, scanned, rematerialised, sampled, compressed, block by block."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import map_leaves, materialise_tree
from jaxcomp.formats.grid import Grid
from jaxcomp.formats.quantized import QuantizedArray
from jaxcomp.models import (
    Block,
    Context,
    Llama,
    LlamaConfig,
    Rope,
    generate,
    init_cache,
    layer_table,
    stack_layers,
    unstack_layers,
)

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": LlamaConfig(
        **SIZES,
        family="gemma3_text",
        local_rope=Rope(100.0),
        sliding_window=4,
        layer_types=("sliding_attention", "full_attention"),
        logit_softcap=3.0,
        query_pre_attn_scalar=12.0,
        tie_embeddings=True,
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 11)), jnp.int32)
sample = jax.jit(generate, static_argnums=(0, 3), static_argnames=("temperature", "apply"))


@pytest.fixture(params=CONFIGS, scope="module")
def config(request):
    return CONFIGS[request.param]


@functools.cache
def init(config):
    """Params far from their initial values: norms too."""
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.2, leaf.shape), leaf.dtype), shapes)


def logits_of(model, params, tokens=TOKENS, **options):
    return jax.jit(lambda params: model.apply({"params": params}, tokens, **options))(params)


@functools.cache
def plain_logits(config):
    return logits_of(Llama(config), init(config))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_equals_uncached(config, scan_layers):
    params = init(config)
    model = Llama(config, scan_layers=scan_layers)
    expected = plain_logits(config)
    step = jax.jit(model.apply)
    variables = {"params": stack_layers(params) if scan_layers else params}
    prefill, cache = step(variables, TOKENS[:, :6], init_cache(config, 2, 16))
    found = [prefill]
    for i in range(6, TOKENS.shape[1]):
        logits, cache = step(variables, TOKENS[:, i : i + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=2e-6)
    assert cache.length == TOKENS.shape[1]


def test_scanned_equals_unrolled(config):
    params = init(config)
    scanned = Llama(config, scan_layers=True)
    stacked = stack_layers(params)
    fresh = jax.eval_shape(scanned.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, fresh)
    np.testing.assert_allclose(logits_of(scanned, stacked), plain_logits(config), atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)


def test_remat_changes_no_gradient():
    config = CONFIGS["gemma3"]

    def gradient(params, **options):
        apply = Llama(config, **options).apply
        loss = lambda params: jnp.mean(jax.nn.logsumexp(apply({"params": params}, TOKENS), axis=-1))
        return jax.jit(jax.grad(loss))(params)

    plain = gradient(init(config))
    for path, leaf in jax.tree.leaves_with_path(plain):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
    jax.tree.map(close, gradient(init(config), remat=True), plain)
    scanned = gradient(stack_layers(init(config)), remat=True, scan_layers=True)
    jax.tree.map(close, unstack_layers(scanned), plain)


def test_window_and_causality_bound_what_a_token_sees():
    config = LlamaConfig(**SIZES | dict(num_layers=1), family="mistral", sliding_window=4)
    params = init(config)
    changed = logits_of(Llama(config), params, TOKENS.at[:, 3].add(1) % 64)
    difference = np.abs(changed - plain_logits(config)).max(axis=(0, 2))
    assert (difference > 0).tolist() == [3 <= i < 3 + config.sliding_window for i in range(TOKENS.shape[1])]


def test_packed_segments_and_left_padding_do_not_mix():
    config, params = CONFIGS["gemma3"], init(CONFIGS["gemma3"])
    model, expected = Llama(config), plain_logits(config)
    packed = jnp.concatenate([TOKENS[:1], TOKENS[1:]], axis=1)
    segments = jnp.repeat(jnp.arange(2, dtype=jnp.int32), TOKENS.shape[1])[None]
    found = logits_of(model, params, packed, segment_ids=segments)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=5e-6)
    padded = jnp.pad(TOKENS, ((0, 0), (3, 0)))
    mask = jnp.pad(jnp.ones_like(TOKENS), ((0, 0), (3, 0)))
    np.testing.assert_allclose(logits_of(model, params, padded, segment_ids=mask)[:, 3:], expected, atol=5e-6)
    plain = sample(model, params, TOKENS, 4)
    np.testing.assert_array_equal(sample(model, params, padded, 4, segment_ids=mask), plain)


def test_explicit_positions_turn_the_rotary_embedding():
    config, params = CONFIGS["llama"], init(CONFIGS["llama"])
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    expected = plain_logits(config)
    np.testing.assert_allclose(logits_of(Llama(config), params, positions=positions + 9), expected, atol=5e-6)
    assert np.abs(logits_of(Llama(config), params, positions=2 * positions) - expected).max() > 1e-3


def test_greedy_generation_equals_an_uncached_argmax_loop(config):
    params, model, steps = init(config), Llama(config), 6
    tokens = jnp.pad(TOKENS, ((0, 0), (0, steps)))
    uncached = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for i in range(TOKENS.shape[1], tokens.shape[1]):
        tokens = tokens.at[:, i].set(jnp.argmax(uncached(tokens)[:, i - 1], axis=-1).astype(jnp.int32))
    found = sample(model, params, TOKENS, steps)
    np.testing.assert_array_equal(found, tokens[:, TOKENS.shape[1] :])


def test_sampling_follows_the_softmax():
    config, params = CONFIGS["llama"], init(CONFIGS["llama"])
    prompt = jnp.broadcast_to(TOKENS[:1, :4], (4000, 4))
    drawn = sample(Llama(config), params, prompt, 1, jax.random.key(0), temperature=0.5)
    probability = jax.nn.softmax(logits_of(Llama(config), params, TOKENS[:1, :4])[0, -1] / 0.5)
    observed = np.bincount(drawn[:, 0], minlength=64) / 4000
    sigma = np.sqrt(probability * (1 - probability) / 4000)
    assert (np.abs(observed - probability) <= 4.5 * sigma + 1 / 4000).all()


def test_generation_refuses_bad_arguments():
    config, params = CONFIGS["llama"], init(CONFIGS["llama"])
    with pytest.raises(ValueError, match="steps >= 1"):
        sample(Llama(config), params, TOKENS, 0)
    with pytest.raises(ValueError, match="pass key"):
        sample(Llama(config), params, TOKENS, 2, temperature=1.0)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 8"):
        Llama(config).apply({"params": params}, TOKENS, init_cache(config, 2, 8))


def test_bfloat16_runs_and_gives_float32_logits():
    config, params = CONFIGS["gemma3"], init(CONFIGS["gemma3"])
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    logits = logits_of(model, low)
    expected = plain_logits(config)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert len(np.unique(logits)) > 0.9 * logits.size  # not rounded to bfloat16 on the way
    assert sample(model, low, TOKENS, 3).shape == (2, 3)


def quantized(params):
    axes = lambda path: (1,) if "embed" in path else (0,)
    quantize = lambda path, x: QuantizedArray.quantize(x, Grid(4, group_size=16), axes(path)) if x.ndim == 2 else x
    return map_leaves(quantize, params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_compressed_leaf_meets_a_kernel(config, scan_layers):
    packed = quantized(init(config))
    packed = stack_layers(packed) if scan_layers else packed
    explanation = explain(Llama(config, scan_layers=scan_layers).apply, {"params": packed}, TOKENS)
    assert not explanation.materialised and not explanation.unused


def test_generation_from_compressed_leaves():
    config = CONFIGS["gemma3"]
    packed = quantized(init(config))
    model = Llama(config, scan_layers=True)
    expected = sample(model, stack_layers(materialise_tree(packed)), TOKENS, 4)
    found = sample(model, stack_layers(packed), TOKENS, 4, apply=compressed(model.apply))
    np.testing.assert_array_equal(found, expected)


def test_blocks_run_one_by_one(config):
    params, table = init(config), layer_table(config)
    model = Llama(config)
    x = model.apply({"params": params}, TOKENS, method="embed_tokens")
    context = Context(jnp.arange(TOKENS.shape[1])[None], jnp.int32(0))
    block = jax.jit(lambda params, x, layer: Block(config).apply({"params": params}, x, None, layer, context)[0])
    for i in range(config.num_layers):
        x = block(params[f"blocks_{i}"], x, jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), table))
    assert block._cache_size() == 1
    logits = model.apply({"params": params}, x, method="logits")
    np.testing.assert_allclose(logits, plain_logits(config), atol=2e-6)


def test_flax_attention_is_a_drop_in():
    config = dataclasses.replace(CONFIGS["llama"], num_kv_heads=4)
    params = init(config)
    found = logits_of(Llama(config, attention_fn=nn.dot_product_attention), params)
    np.testing.assert_allclose(found, plain_logits(config), atol=2e-6)
