"""Equivalent transformations leave a float block unchanged, in every family; what is not equivalent fails the same test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcomp.models import Block, Context, LlamaConfig, layer_table
from jaxcomp.quantize.affinequant import Affine, dominant, gradual_mask
from jaxcomp.quantize.attention import BlockRunner
from jaxcomp.quantize.let import INPUTS, NAMES, Rescaling, let_apply, truncate

SIZES = dict(vocab_size=8, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "one head each": LlamaConfig(**SIZES | dict(num_kv_heads=4)),
    "qwen2": LlamaConfig(**SIZES, family="qwen2"),
    "qwen3": LlamaConfig(**SIZES, family="qwen3"),
    "gemma2": LlamaConfig(**SIZES, family="gemma2", attn_softcap=5.0, sliding_window=4),
    "gemma3": LlamaConfig(**SIZES, family="gemma3_text", query_pre_attn_scalar=12.0),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)), jnp.float32)
run = jax.jit(BlockRunner.__call__, static_argnums=0)


@functools.cache
def block_of(name):
    """Random params of one block, gains and biases too."""
    context = Context(jnp.arange(7)[None], jnp.zeros((), jnp.int32))
    init = lambda: Block(CONFIGS[name]).init(jax.random.key(0), X, None, layer_of(name), context)
    shapes = jax.eval_shape(init)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.3, leaf.shape), jnp.float32), shapes)


def layer_of(name):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), layer_table(CONFIGS[name]))


def output(name, block):
    return run(BlockRunner(CONFIGS[name]), block, X, layer_of(name))[0]


def change(name, block):
    """Largest change of the block's branch relative to its largest value."""
    want = output(name, block_of(name))
    return float(jnp.abs(output(name, block) - want).max() / jnp.abs(want - X).max())


def stats_of(name, seed=2):
    """Made-up statistics of the inputs of a block."""
    rng = np.random.default_rng(seed)
    flat = flatten_dict(block_of(name), sep="/")
    draw = lambda path: jnp.asarray(np.exp(rng.normal(size=flat[path].shape[0])), jnp.float32)
    return {
        path: {"max_abs": draw(path), "max_value": draw(path), "min_value": -draw(path)} for path in INPUTS.values()
    }


def random_like(tree, seed=3):
    """Positive factors between 0.2 and 5, far from one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(np.exp(rng.uniform(-1.6, 1.6, a.shape)), jnp.float32), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_positive_scales_leave_the_block_unchanged(name):
    config, block = CONFIGS[name], block_of(name)
    theta = Rescaling().init(config, block, stats_of(name))
    assert set(theta["let"]) == set(NAMES)
    for let in (theta["let"], random_like(theta["let"])):
        rewritten = let_apply(config, block, let)
        assert change(name, rewritten) < 1e-5
        old, new = (flatten_dict(tree, sep="/") for tree in (block, rewritten))
        assert all(not jnp.allclose(old[path], new[path], rtol=0.1) for path in old if path.endswith("kernel"))


def test_negative_scales_are_as_exact():
    let = jax.tree.map(
        jnp.negative, random_like(Rescaling().init(CONFIGS["qwen2"], block_of("qwen2"), stats_of("qwen2"))["let"])
    )
    assert change("qwen2", let_apply(CONFIGS["qwen2"], block_of("qwen2"), let)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scales_not_tied_over_rotated_pairs_change_the_function(name):
    theta = Rescaling(("qkt",), tie_rotary=False).init(CONFIGS[name], block_of(name), {})
    assert theta["let"]["qkt"].shape[-1] == CONFIGS[name].head_dim
    assert change(name, let_apply(CONFIGS[name], block_of(name), theta["let"])) < 1e-6  # ones
    assert change(name, let_apply(CONFIGS[name], block_of(name), random_like(theta["let"]))) > 1e-3


def test_shift_moves_into_the_bias_of_o():
    config, block, rescaling = CONFIGS["llama"], block_of("llama"), Rescaling(("out",), shift=True)
    theta = rescaling.init(config, block, stats_of("llama"))
    rewritten = rescaling.apply(config, block, theta)
    assert float(jnp.abs(theta["let"]["shift"]).max()) > 0.1
    assert float(jnp.abs(rewritten["attn"]["o"]["bias"] - block["attn"]["o"]["bias"]).max()) > 0.1
    assert change("llama", rewritten) < 1e-5
    with pytest.raises(ValueError, match=r"needs biases on attn/v and attn/o.*none on \['o'\]"):
        rescaling.init(CONFIGS["qwen2"], block_of("qwen2"), stats_of("qwen2"))


def test_initial_scales_are_smoothquants():
    config, stats = CONFIGS["qwen2"], stats_of("qwen2")
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(block_of("qwen2"), sep="/").items()}
    let = Rescaling(alpha=0.6).init(config, block_of("qwen2"), stats)["let"]
    largest = lambda *names: np.max([np.abs(flat[f"{name}/kernel"]).max(1) for name in names], 0)
    smooth = lambda x, w: np.asarray(x, np.float64) ** 0.6 / w**0.4
    act = {name: stats[path]["max_abs"] for name, path in INPUTS.items()}
    np.testing.assert_allclose(let["qkv"], smooth(act["qkv"], largest("attn/q", "attn/k", "attn/v")), rtol=1e-5)
    np.testing.assert_allclose(let["fc1"], smooth(act["fc1"], largest("mlp/gate", "mlp/up")), rtol=1e-5)
    np.testing.assert_allclose(let["fc2"], smooth(act["fc2"], largest("mlp/down")), rtol=1e-5)
    heads = lambda x: np.asarray(x).reshape(2, 2, 8).max(1)  # query heads 0, 1 read key-value head 0
    np.testing.assert_allclose(let["out"], smooth(heads(act["out"]), heads(largest("attn/o"))), rtol=1e-5)
    np.testing.assert_array_equal(let["qkt"], np.ones((2, 4)))


def test_truncation_keeps_signs_and_passes_gradients():
    s = jnp.asarray([0.5, 9e-3, 0.0, -1e-4, -2.0])
    np.testing.assert_allclose(truncate(s), [0.5, 1e-2, 1e-2, -1e-2, -2.0])
    np.testing.assert_array_equal(jax.grad(lambda s: (truncate(s) * jnp.arange(5.0)).sum())(s), np.arange(5.0))


@pytest.mark.parametrize("options", [{"names": ("qkv", "fc3")}, {"alpha": 1.2}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"unknown transforms \['fc3'\]|alpha must be in"):
        Rescaling(**options)


@pytest.mark.parametrize("name", CONFIGS)
def test_affine_matrices_leave_the_block_unchanged(name):
    """Matrices full of noise at the end of the schedule, where the mask lets all of them in."""
    config, block, affine = CONFIGS[name], block_of(name), Affine(epochs=5, stability=0.5)
    theta = affine.init(config, block, stats_of(name))
    assert change(name, affine.apply(config, block, theta)) < 1e-5
    rng = np.random.default_rng(4)
    noise = jax.tree.map(lambda a: a + jnp.asarray(rng.normal(size=a.shape), jnp.float32), theta["let"])
    rewritten = affine.apply(config, block, {"let": noise, "clock": jnp.asarray(5.0)})
    assert change(name, rewritten) < 1e-4
    plain = let_apply(config, block, {name: noise[name] for name in ("qkv", "fc1")})
    for path in ("v", "o", *(() if config.traits.qk_norm else ("q", "k"))):
        assert float(jnp.abs(rewritten["attn"][path]["kernel"] - plain["attn"][path]["kernel"]).max()) > 0.05


def test_gradual_mask_widens_by_the_papers_schedule():
    for epoch, reach in zip(range(6), (1, 2, 3, 5, 6, 8), strict=True):  # floor(7 / 5 e) + 1 of AffineQuant's mask
        want = np.array([[1 if i == j else 0.1 if abs(i - j) < reach else 0 for j in range(8)] for i in range(8)])
        np.testing.assert_allclose(gradual_mask(8, jnp.asarray(float(epoch)), 6, 0.1), want)
    np.testing.assert_array_equal(gradual_mask(4, jnp.zeros(()), 1, 0.1), np.eye(4))


def test_matrices_are_diagonally_dominant_whatever_is_learned():
    a = jnp.asarray(np.random.default_rng(5).normal(size=(3, 6, 6)) * 10, jnp.float32).at[0, 2, 2].set(0.0)
    found = np.abs(np.asarray(dominant(a), np.float64))
    diagonal = np.diagonal(found, axis1=1, axis2=2)
    assert (found.sum(-1) - diagonal < diagonal).all()
    mild = jnp.eye(6)[None] + 0.1 * jnp.tri(6, k=-1)[None]
    np.testing.assert_array_equal(dominant(mild), mild)
