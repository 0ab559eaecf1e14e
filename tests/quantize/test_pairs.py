"""Rescaling a producer and its consumers keeps the function of every family, and wrong pairs are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.core.transform import compress
from jaxcomp.models.llama import Llama, stack_layers
from jaxcomp.models.llama_config import LlamaConfig
from jaxcomp.quantize import GEMMA, LINEAR, LLAMA, Pair, rtn, smoothquant
from jaxcomp.quantize.pairs import bind, rescale

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, head_dim=4)


def random_params(shapes, key):
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def llama(family, kv_heads=4, scan=False):
    """(params with random gains and biases, calibration) of a tiny decoder."""
    config = LlamaConfig(family=family, num_kv_heads=kv_heads, **SIZES)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, config.vocab_size)
    model = Llama(config)
    params = random_params(jax.eval_shape(model.init, jax.random.key(1), tokens)["params"], jax.random.key(2))
    params = stack_layers(params) if scan else params
    model = Llama(config, scan_layers=scan)
    return params, Calibration(lambda p, tokens: model.apply({"params": p}, tokens), [tokens])


def random_scales(places):
    keys = jax.random.split(jax.random.key(7), len(places))
    shape = lambda place: (*place.consumers[0].matrix.shape[:-2], place.consumers[0].matrix.shape[-1])
    return [jnp.exp(jax.random.normal(key, shape(place))) for key, place in zip(keys, places, strict=True)]


def rescaled(params, pairs, data):
    places = bind(params, pairs, data)
    return places, rescale(params, places, random_scales(places), data)


@pytest.mark.parametrize(
    "family, kv_heads, scan, pairs, count",
    [
        ("llama", 4, False, LLAMA + LINEAR, 8),
        ("qwen2", 4, True, LLAMA + LINEAR, 4),
        ("gemma2", 2, False, GEMMA + LINEAR, 6),
        ("gemma3_text", 4, True, GEMMA + LINEAR, 4),
    ],
)
def test_logits_are_unchanged(family, kv_heads, scan, pairs, count):
    params, data = llama(family, kv_heads, scan)
    places, new = rescaled(params, pairs, data)
    assert len(places) == count
    run = jax.jit(data.apply)
    before, after = run(params, data.batches[0]), run(new, data.batches[0])
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))
    old, new = leaves_with_paths(params), leaves_with_paths(new)
    changed = {path for path in old if not jnp.array_equal(old[path], new[path])}
    members = {place.source for place in places} | {t.path for place in places for t in place.consumers}
    biases = {path for path in old if path.endswith("v/bias") and kv_heads == 4}  # v's output is scaled, so its bias
    assert changed == members | biases


class Attention(nn.Module):
    """LayerNorm with bias, multi-head attention with kernels of three axes, a convolution over time."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, name="attn")(nn.LayerNorm(name="norm")(x))
        return nn.Conv(8, (3,), name="conv")(nn.LayerNorm(name="out_norm", use_bias=False)(x))


ATTENTION = (
    Pair("params/norm/scale", tuple(f"params/attn/{n}/kernel" for n in ("query", "key", "value"))),
    Pair("params/attn/value/kernel", ("params/attn/out/kernel",)),
)


@pytest.fixture(scope="module")
def attention():
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    params = random_params(jax.eval_shape(Attention().init, jax.random.key(1), x), jax.random.key(2))
    return params, Calibration(lambda p, x: Attention().apply(p, x), [x])


def test_pairs_of_ones_own_on_any_flax_model(attention):
    params, data = attention
    places, new = rescaled(params, ATTENTION, data)
    assert [len(place.consumers) for place in places] == [3, 1]
    before, after = data.apply(params, data.batches[0]), data.apply(new, data.batches[0])
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))
    ratio = leaves_with_paths(new)["params/norm/bias"] / leaves_with_paths(params)["params/norm/bias"]
    np.testing.assert_allclose(ratio * random_scales(places)[0], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "pair, message",
    [
        (
            Pair("*/pre_norm/scale", ()),
            r"matches no leaf; the nearest paths are \['params/norm/scale', 'params/out_norm/scale'.*pass pairs=",
        ),
        (
            Pair("*/norm/scale", ("*/attn/quer/kernel",)),
            r"'params/attn/quer/kernel' is not in the tree.*attn/query/kernel",
        ),
        (
            Pair("*/norm/scale", ("*/conv/kernel",)),
            r"norm/scale produces \(16,\), but params/conv/kernel consumes \(48,\)",
        ),
        (Pair("*/norm/scale", ("*/attn/query/bias",)), "params/attn/query/bias: the model multiplies nothing with it"),
        (Pair("*/*/scale", ("*/attn/query/kernel",)), "one '\\*' in the source"),
        (Pair("params/norm/scale", ("*/attn/query/kernel",)), "one '\\*' in the source"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
def test_wrong_pairs_are_errors_with_a_remedy(attention, pair, message):
    params, data = attention
    with pytest.raises(ValueError, match=message):
        bind(params, (pair,), data)


def test_a_forgotten_consumer_is_noticed(attention):
    params, data = attention
    with pytest.raises(ValueError, match=r"changes the model's outputs.*miss a consumer"):
        rescaled(params, (Pair("params/norm/scale", ("params/attn/query/kernel", "params/attn/key/kernel")),), data)


def test_the_wrong_kind_of_gain_is_noticed():
    params, data = llama("gemma2", scan=True)
    with pytest.raises(ValueError, match="use GEMMA"):
        rescaled(params, LLAMA, data)


def test_compressed_leaves_are_not_rescaled(toy):
    packed = compress(rtn(4), toy.params)[0]
    with pytest.raises(
        ValueError, match=r"attn/q/kernel: expected a dense array.*found QuantizedArray; rescale before"
    ):
        compress(smoothquant(), packed, toy.data)
