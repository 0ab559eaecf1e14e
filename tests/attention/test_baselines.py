"""Baselines against a restatement of each rule as a token mask; thresholds that keep everything; one density accounting."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from jaxcomp.attention import baselines
from jaxcomp.attention.baselines.minference import CANDIDATES, search
from jaxcomp.attention.heads import synthetic_head

LENGTH, BLOCK = 256, 16
DENSE = baselines.dense(block=BLOCK)
CASES = {  # method, its mask
    "dense": (DENSE, lambda q, k: naive.causal(len(q))),
    "mean_pool": (baselines.mean_pool(0.7, block=BLOCK), lambda q, k: naive.mean_pool(q, k, 0.7, BLOCK)),
    "xattention": (
        baselines.xattention(0.7, stride=4, block=BLOCK),
        lambda q, k: naive.xattention(q, k, 0.7, BLOCK, 4),
    ),
    "pbs": (baselines.pbs(0.7, segment=64, block=BLOCK), lambda q, k: naive.pbs(q, k, 0.7, 64, BLOCK)),
    "flex_prefill": (
        baselines.flex_prefill(0.7, min_budget=32, block=BLOCK),
        lambda q, k: naive.flex_prefill(q, k, 0.7, 0.1, 32, BLOCK)[0],
    ),
    "flex_prefill aware": (
        baselines.flex_prefill(0.7, tau=2.0, min_budget=32, block=BLOCK),
        lambda q, k: naive.flex_prefill(q, k, 0.7, 2.0, 32, BLOCK)[0],
    ),
    "minference": (
        baselines.minference(baselines.Pattern("vertical_slash", 40, 100), block=BLOCK),
        lambda q, k: naive.filled(naive.vertical_slash(q, k, 40, 100, BLOCK), BLOCK),
    ),
    "anchor": (
        baselines.anchor(2.0, group=4, block=BLOCK),
        lambda q, k: naive.filled(naive.anchor(q, k, 2.0, 4, BLOCK), BLOCK),
    ),
    "sparge": (
        baselines.sparge(0.7, similarity=0.12, skip=1e9, block_q=BLOCK, block_k=BLOCK),
        lambda q, k: naive.sparge(q, k, 0.7, 0.12, BLOCK, BLOCK),
    ),
    "oracle_blocks": (baselines.oracle_blocks(0.7, block=BLOCK), lambda q, k: naive.oracle_blocks(q, k, 0.7, BLOCK)),
}
EVERYTHING = {
    "mean_pool": baselines.mean_pool(1.1, block=BLOCK),
    "xattention": baselines.xattention(1.1, block=BLOCK),
    "pbs": baselines.pbs(1.1, segment=64, block=BLOCK),
    "flex_prefill": baselines.flex_prefill(1.1, block=BLOCK),
    "minference": baselines.minference(baselines.Pattern("vertical_slash", LENGTH, LENGTH), block=BLOCK),
    "anchor": baselines.anchor(1e9, group=4, block=BLOCK),
    "sparge": baselines.sparge(1.1, block_q=BLOCK, block_k=BLOCK),
    "blasst": baselines.blasst(1e-30, block=BLOCK),
    "oracle_blocks": baselines.oracle_blocks(1.1, block=BLOCK),
    "oracle_order": baselines.oracle_order(0.0, segment=32, block_q=BLOCK, block_k=BLOCK),
}


def head(kind="mixed", length=LENGTH):
    return synthetic_head(kind, length, 0)


def run(method, q, k, v):
    out, stats = jax.jit(method.attend)(*(jnp.asarray(x)[:, None] for x in (q, k, v)))
    return np.asarray(out)[:, 0], stats


def block_density(mask):
    """Tiles with a visited pair over causal tiles."""
    count = len(mask) // BLOCK
    return mask.reshape(count, BLOCK, count, BLOCK).any((1, 3)).sum() / (count * (count + 1) / 2)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_masked_softmax_of_its_rule(name):
    method, mask_of = CASES[name]
    q, k, v = head("vertical")
    mask = mask_of(q.astype(np.float64), k.astype(np.float64))
    out, stats = run(method, q, k, v)
    np.testing.assert_allclose(out, naive.attend(q, k, v, mask), atol=2e-4)
    if name not in ("pbs", "minference", "anchor"):  # these gather keys: their tiles are not contiguous
        np.testing.assert_allclose(stats.density[0], block_density(mask), rtol=1e-6)
    if name != "dense":
        assert not mask.all() and mask.sum() < 0.9 * naive.causal(LENGTH).sum()  # the case says something


@pytest.mark.parametrize("name", EVERYTHING)
def test_keeps_everything_at_the_end_of_its_scale(name):
    q, k, v = head()
    out, stats = run(EVERYTHING[name], q, k, v)
    np.testing.assert_allclose(out, naive.attend(q, k, v, naive.causal(LENGTH)), atol=1e-4)
    np.testing.assert_allclose(stats.density[0], 1.0, rtol=1e-6)


def test_blasst_skips_what_the_running_maximum_rules_out():
    q, k, v = head("slash")
    wanted, used = naive.blasst(q, k, v, 0.3, BLOCK)
    out, stats = run(baselines.blasst(0.3, block=BLOCK), q, k, v)
    np.testing.assert_allclose(out, wanted, atol=2e-4)
    assert 0 < used < 110 and int(stats.blocks.sum()) == used
    assert float(stats.density[0]) == 1.0 and float(stats.value_density[0]) < 1.0


def test_patterns_differ_per_head():
    q, k, v = (jnp.asarray(x)[:, None].repeat(2, 1) for x in head())
    patterns = baselines.Pattern("streaming", 16, 32), baselines.Pattern("block_sparse", 3)
    both = jax.jit(baselines.minference(patterns, block=BLOCK))(q, k, v)
    for h, pattern in enumerate(patterns):
        alone = jax.jit(baselines.minference(pattern, block=BLOCK))(q[:, :1], k[:, :1], v[:, :1])
        np.testing.assert_allclose(both[:, h], alone[:, 0], atol=1e-5)
    assert float(jnp.abs(both[:, 0] - both[:, 1]).max()) > 1e-3


def test_search_finds_the_pattern_of_a_head():
    local = np.eye(LENGTH, 64, dtype=np.float32)
    rng = np.random.default_rng(0)
    wave = np.exp(-0.5 * ((np.arange(LENGTH)[:, None] / 4 - np.arange(64)) / 1.0) ** 2).astype(np.float32)
    q = k = jnp.asarray(12 * wave)[:, None]
    v = jnp.asarray(rng.standard_normal(local.shape, np.float32))[:, None]
    candidates = baselines.Pattern("block_sparse", 1), baselines.Pattern("streaming", 1, 48)
    assert search(q, k, v, candidates, block=BLOCK) == [candidates[1]]
    assert len(CANDIDATES) == 7


def test_unknown_pattern_and_stride_are_refused():
    q, k, v = (jnp.asarray(x)[:, None] for x in head())
    with pytest.raises(ValueError, match="expected vertical_slash"):
        baselines.minference(baselines.Pattern("diagonal", 1), block=BLOCK)(q, k, v)
    with pytest.raises(ValueError, match="must divide block=16"):
        baselines.xattention(stride=5, block=16)
    with pytest.raises(ValueError, match="must divide segment=250"):
        baselines.pbs(segment=250, block=16)


def test_the_order_of_truth_beats_the_order_of_means():
    q, k, v = synthetic_head("slash", 1024, 0)
    exact = naive.attend(q, k, v, naive.causal(1024))
    from jaxcomp.attention import s2o

    sizes = dict(segment=64, block_q=32, block_k=32)
    errors = {}
    for name, method in (("mean", s2o(threshold=0.03, **sizes)), ("truth", baselines.oracle_order(0.03, **sizes))):
        out, stats = run(method, q, k, v)
        errors[name] = float(((out - exact) ** 2).mean()), float(stats.density[0])
    assert errors["truth"][0] * errors["truth"][1] < errors["mean"][0] * errors["mean"][1]


@pytest.mark.parametrize(
    "make",
    [
        lambda t: baselines.xattention(t, stride=4, block=BLOCK),
        lambda t: baselines.flex_prefill(t, tau=2.0, min_budget=32, block=BLOCK),
        lambda t: baselines.anchor(4 * t, group=4, block=BLOCK),
        lambda t: baselines.blasst(t, block=BLOCK),
    ],
    ids=["xattention", "flex_prefill", "anchor", "blasst"],
)
def test_a_threshold_for_each_head(make):
    """Calibrated thresholds differ per head; batches repeat them."""
    heads = [synthetic_head("mixed", LENGTH, seed) for seed in (0, 1)]
    q, k, v = (jnp.stack([jnp.stack(x, 1)] * 2) for x in zip(*heads, strict=True))
    levels = jnp.asarray([0.4, 0.9])
    run = jax.jit(lambda t: make(t).attend(q, k, v))
    (out, stats), apart = run(levels), [run(level) for level in levels]
    for head, (alone, counted) in enumerate(apart):
        np.testing.assert_allclose(out[:, :, head], alone[:, :, head], atol=1e-6)
        np.testing.assert_allclose(stats.value_density[:, head], counted.value_density[:, head], rtol=1e-6)
    assert float(jnp.abs(apart[0][0] - apart[1][0]).max()) > 1e-4
