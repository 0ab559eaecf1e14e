"""S2O: exact at threshold 0, causal, stoppable, bounded, for every shape that a model may bring."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from jaxcomp.attention import certificate, dense_attention, s2o, visited_keys
from jaxcomp.attention.heads import synthetic_head
from jaxcomp.attention.s2o import default_threshold
from jaxcomp.models import Llama, LlamaConfig, dot_product_attention
from jaxcomp.models.llama import init_cache

SIZES = dict(segment=32, block_q=16, block_k=16)
MODES = {
    "anti_sink": {},
    "mean_key": dict(guide="mean_key"),
    "mean_query": dict(guide="mean_query"),
    "none": dict(guide="none"),
    "sub_means": dict(sub_means=4),
    "runs": dict(sub_means=4, runs=2),
    "share_group": dict(share_group=True),
    "budget": dict(stop="budget"),
    "prefix_cdf": dict(stop="prefix_cdf"),
    "full": dict(causal=False),
}


def qkv(length=200, heads=4, kv_heads=2, depth=16, batch=(), seed=0, dtype=jnp.float32, scale=1.5):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(*batch, length, n, depth) for n in (heads, kv_heads, kv_heads)]
    return [scale * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def exact(q, k, v, causal=True):
    mask = jnp.tril(jnp.ones((q.shape[-3], k.shape[-3]), bool), k.shape[-3] - q.shape[-3]) if causal else None
    return dot_product_attention(q, k, v, mask=mask)


@functools.cache
def attend(**options):
    return jax.jit(s2o(**SIZES | options).attend)


@pytest.mark.parametrize("mode", MODES)
def test_threshold_zero_is_dense(mode):
    options = MODES[mode]
    q, k, v = qkv()
    out, stats = attend(threshold=0.0, **options)(q, k, v)
    np.testing.assert_allclose(out, exact(q, k, v, options.get("causal", True)), atol=1e-5)
    assert stats.density.shape == (4,) and float(stats.omitted.max()) == 0.0
    np.testing.assert_allclose(stats.density, 1.0, atol=0.02)  # lists end in blocks, rows in tiles


def test_error_is_the_omitted_mass_times_the_shift_of_its_mean():
    q, k, v = qkv(heads=2, kv_heads=1)
    method = s2o(threshold=0.1, **SIZES)
    out, stats = jax.jit(method.attend)(q, k, v)
    flat = [jnp.moveaxis(x, 1, 0) for x in (q, k)]
    seen = np.asarray(visited_keys(method.plan(*flat, 0), stats.blocks, 200, 200, block_q=16, block_k=16))
    full = naive.causal(200)
    for h in range(2):
        query, key, value = (np.asarray(x, np.float64) for x in (q[:, h], k[:, 0], v[:, 0]))
        p = naive.softmax(np.where(full, query @ key.T / 4, -np.inf))
        omitted = np.where(seen[h], 0, p)
        mass = omitted.sum(1, keepdims=True)
        mean = omitted @ value / np.maximum(mass, 1e-30)
        error = p @ value - out[:, h]
        np.testing.assert_allclose(error, mass * (mean - out[:, h]), atol=1e-5)
        assert (np.linalg.norm(error, axis=1) <= 2 * mass[:, 0] * np.linalg.norm(value, axis=1).max() + 1e-5).all()
        assert 0.05 < mass.max()  # the identity says something here


def sorted_head(length=256, depth=16):
    """Keys whose mass falls with their place for every query, so that the gain of blocks falls too."""
    k = np.zeros((length, 1, depth), np.float32)
    k[:, 0, 0] = np.linspace(6, -6, length)
    q = np.zeros_like(k)
    q[..., 0] = 4.0
    return jnp.asarray(q), jnp.asarray(k), jax.random.normal(jax.random.key(0), k.shape)


@pytest.mark.parametrize("stop", ["gain", "budget"])
def test_bound_holds_where_masses_fall(stop):
    q, k, v = sorted_head()
    out, stats = attend(threshold=0.2, stop=stop, guide="none")(q, k, v)
    error = jnp.linalg.norm(out - exact(q, k, v), axis=-1).max()
    assert 0 < float(error) <= float(stats.error_bound[0])
    assert float(stats.density[0]) < 0.9
    if stop == "budget":
        assert float(stats.omitted.max()) < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_certificate_holds_without_assumptions(seed):
    q, k, _ = (np.asarray(x) for x in qkv(128, 1, 1, seed=seed))
    rows, keys = q[96:, 0], k[:96, 0]
    scores = rows.mean(0) @ keys.T / 4
    order, logits = np.argsort(-scores), rows @ keys.T / 4
    for visited in (0, 16, 64, 96):
        seen = np.exp(logits[:, order[:visited]]).sum(1) + 1.0
        true = 1 - seen / (np.exp(logits).sum(1) + 1.0)
        bound = certificate(rows, jnp.asarray(scores), jnp.asarray(order), visited, keys, jnp.log(jnp.asarray(seen)))
        assert (true <= np.asarray(bound) + 1e-6).all()


def test_values_are_causal_and_selection_is_causal_by_segment():
    q, k, v = qkv(heads=2)
    poke = lambda x, row: x.at[row].add(3.0)
    for threshold, row, untouched in ((0.0, 150, 150), (0.1, 150, 128)):
        run = attend(threshold=threshold)
        before, after = run(q, k, v)[0], run(poke(q, row), poke(k, row), poke(v, row))[0]
        np.testing.assert_allclose(before[:untouched], after[:untouched], atol=2e-6)
        assert float(jnp.abs(before[row:] - after[row:]).max()) > 1e-3


def test_larger_thresholds_visit_fewer_blocks_and_err_more():
    q, k, v = qkv(256)
    run = jax.jit(lambda t: s2o(threshold=t, **SIZES).attend(q, k, v))
    results = [run(t) for t in (0.0, 0.05, 0.15, 0.5)]
    errors = [float(((out - exact(q, k, v)) ** 2).mean()) for out, _ in results]
    assert errors == sorted(errors) and errors[-1] > 10 * errors[1] > 0
    for (_, low), (_, high) in itertools.pairwise(results):
        assert (low.blocks >= high.blocks).all() and (low.density >= high.density).all()


def test_a_threshold_for_each_head():
    q, k, v = qkv(256, batch=(2,))
    out, stats = jax.jit(s2o(threshold=np.array([0.0, 0.4, 0.0, 0.4], np.float32), **SIZES).attend)(q, k, v)
    np.testing.assert_allclose(out[:, :, ::2], exact(q, k, v)[:, :, ::2], atol=1e-5)
    assert (stats.density[:, 1::2] < 0.9).all() and stats.density.shape == (2, 4)


def test_sub_means_of_runs_follow_a_moving_diagonal():
    """At equal density, the guide alone scatters the rows of a sub-mean over the segment, and blurs what moves with them."""
    q, k, v = (jnp.asarray(x)[:, None] for x in synthetic_head("slash", 1024, 0))
    error = {}
    for runs in (1, 4):
        out, _ = attend(threshold=0.0, cap=128, segment=64, sub_means=4, runs=runs)(q, k, v)
        error[runs] = float(((out - exact(q, k, v)) ** 2).mean())
    assert 0 < error[4] < 0.8 * error[1]


def test_a_cap_shortens_lists():
    q, k, v = qkv(256)
    _, stats = attend(threshold=0.0, cap=32)(q, k, v)
    assert int(stats.blocks.max()) == 2


def test_chunks_with_a_cache_equal_the_whole():
    q, k, v = qkv(256, batch=(1,))
    run = attend(threshold=0.1)
    whole, _ = run(q, k, v)
    grow = lambda x, filled: jnp.where(
        jnp.arange(288)[None, :, None, None] < filled, jnp.pad(x, ((0, 0), (0, 32), (0, 0), (0, 0))), 7.0
    )
    for start in range(0, 256, 64):
        end = start + 64
        mask = jnp.arange(288)[None] <= start + jnp.arange(64)[:, None]
        part, stats = run(q[:, start:end], grow(k, end), grow(v, end), mask=mask[None, None])
        np.testing.assert_allclose(part, whole[:, start:end], atol=1e-5)
    assert float(stats.density.max()) < 0.95


@pytest.mark.parametrize("length", [0, 1, 31, 64])
def test_short_sequences_are_dense(length):
    q, k, v = qkv(length)
    out, stats = s2o(threshold=0.9, **SIZES).attend(q, k, v)
    assert out.shape == q.shape and (stats.density == 1).all()
    if length:
        np.testing.assert_allclose(out, exact(q, k, v), atol=1e-5)


def test_batches_do_not_raise_the_work():
    q, k, v = qkv(256, batch=(2,))
    q = q.at[1].mul(0.05)  # diffuse: visits far more
    run = lambda q, k, v: s2o(threshold=0.03, **SIZES).attend(q, k, v)
    together = jax.jit(jax.vmap(run))(q, k, v)
    apart = [attend(threshold=0.03)(*(x[i] for x in (q, k, v))) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(together[0][i], apart[i][0], atol=1e-5)
        np.testing.assert_array_equal(together[1].blocks[i], apart[i][1].blocks)
    assert int(apart[0][1].blocks.sum()) < int(apart[1][1].blocks.sum())


def test_bfloat16():
    q, k, v = qkv(dtype=jnp.bfloat16)
    out, _ = attend(threshold=0.0)(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32), exact(*(x.astype(jnp.float32) for x in (q, k, v))), atol=0.05
    )


@pytest.mark.parametrize("mask", ["window", "packed"])
def test_other_masks_run_dense(mask):
    q, k, v = qkv(256, batch=(1,))
    distance = jnp.arange(256)[:, None] - jnp.arange(256)[None]
    seen = (distance >= 0) & (distance < 48 if mask == "window" else jnp.arange(256)[None] >= 64)
    seen = seen | (distance == 0)
    out, stats = attend(threshold=0.3)(q, k, v, mask=seen[None, None])
    np.testing.assert_allclose(out, dot_product_attention(q, k, v, mask=seen[None, None]), atol=1e-5)
    assert (stats.density == 1).all()


def test_drops_into_our_decoder_with_and_without_a_cache():
    config = LlamaConfig(61, 32, 48, 2, 4, num_kv_heads=2, head_dim=8, max_len=256)
    tokens = jax.random.randint(jax.random.key(1), (2, 160), 0, 61)
    params = Llama(config).init(jax.random.key(0), tokens)
    dense = jax.jit(Llama(config).apply)(params, tokens)
    model = Llama(config, s2o(threshold=0.0, **SIZES))
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), dense, atol=1e-4)
    cached, cache = jax.jit(model.apply)(params, tokens[:, :159], init_cache(config, 2, 192))
    last, _ = jax.jit(model.apply)(params, tokens[:, 159:], cache)
    np.testing.assert_allclose(jnp.concatenate([cached, last], 1), dense, atol=1e-4)
    sparse = jax.jit(Llama(config, s2o(threshold=0.5, guide="none", **SIZES)).apply)(params, tokens)
    assert float(jnp.abs(sparse - dense).max()) > 1e-4


def test_drops_into_flax():
    x = jax.random.normal(jax.random.key(0), (2, 128, 32))
    layer = nn.MultiHeadDotProductAttention(4, deterministic=True)
    params = layer.init(jax.random.key(1), x)
    mask = nn.make_causal_mask(jnp.ones((2, 128)), dtype=bool)
    sparse = layer.clone(attention_fn=s2o(threshold=0.0, **SIZES))
    np.testing.assert_allclose(
        jax.jit(sparse.apply)(params, x, mask=mask), layer.apply(params, x, mask=mask), atol=1e-5
    )
    full = layer.clone(attention_fn=s2o(threshold=0.0, causal=False, **SIZES))
    np.testing.assert_allclose(jax.jit(full.apply)(params, x), layer.apply(params, x), atol=1e-5)


def test_default_threshold_falls_with_length():
    assert default_threshold("gain", 8192) == 0.01 and default_threshold("gain", 65536) == 0.01 / 8
    assert default_threshold("budget", 8192) == default_threshold("budget", 65536)
    q, k, v = qkv(128)
    np.testing.assert_array_equal(attend()(q, k, v)[0], attend(threshold=0.5)(q, k, v)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(threshold=1.0), r"\[0, 1\), found 1.0"),
        (dict(threshold=-0.1), "0 is dense"),
        (dict(threshold=np.array([0.1, np.nan])), "found"),
        (dict(segment=100, block_q=64), "block_q=64 must divide segment=100"),
        (dict(sub_means=3), "sub_means=3 must divide"),
        (dict(sub_means=4, runs=3), "runs=3 must divide sub_means=4"),
        (dict(segment=0, block_q=1), "at least 1"),
        (dict(guide="oracle"), "anti_sink, mean_key"),
        (dict(stop="cdf"), "gain, budget, prefix_cdf"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        s2o(**options)


def test_inputs_that_do_not_fit_are_refused():
    q, k, v = qkv(128)
    method = s2o(threshold=0.1, **SIZES)
    with pytest.raises(ValueError, match="query: 1 of"):
        method(q.at[5, 0, 0].set(jnp.nan), k, v)
    with pytest.raises(ValueError, match="K a divisor of H"):
        method(q[:, :3], k, v)
    with pytest.raises(ValueError, match="S >= T"):
        method(q, k[:64], v[:64])
    with pytest.raises(ValueError, match="no bias"):
        method(q, k, v, bias=jnp.zeros((128, 128)))
    with pytest.raises(ValueError, match="no softcap"):
        method(q, k, v, softcap=30.0)
    with pytest.raises(ValueError, match="no dropout"):
        method(q, k, v, dropout_rate=0.1)
    with pytest.raises(ValueError, match="cannot continue a cache"):
        s2o(guide="mean_key", **SIZES)(q[:64], k, v)


def test_dense_in_chunks_equals_dense_at_once():
    q, k, v = qkv(600, batch=(2,))
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 1, 600, 600)).at[..., 0].set(True)
    np.testing.assert_allclose(
        jax.jit(dense_attention)(q, k, v, mask), dot_product_attention(q, k, v, mask=mask), atol=1e-5
    )
