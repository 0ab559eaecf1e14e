"""FlowCache per chunk against a restatement in numpy; the compression of finished chunks keeps what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_video import CHUNKS, DENOISER, NOISE, PARAMS, SOLVER, STEPS

from jaxcomp.models.video_dit import ChunkKV
from jaxcomp.sampling.autoregressive import embedded, sample_chunks, staggered, tabled, time_table
from jaxcomp.sampling.cache.flowcache import compress_cache, flowcache, teacache, uniform

SCHEDULE = staggered(CHUNKS, STEPS, 2)
TABLE = np.array([0.0, 0.3, 0.2, 0.5, 0.1, 0.4])


@jax.jit
def traced(threshold):
    policy = flowcache(threshold, tabled(TABLE), warmup=1)
    return sample_chunks(DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE, policy=policy)


def computed(trace):
    """bool[G, n]: the steps at which a chunk computed."""
    tokens = np.asarray(trace.tokens)[..., 0]
    return np.array([tokens[SCHEDULE.step[:, g] >= 0, g] > 0 for g in range(tokens.shape[1])])


@pytest.mark.parametrize("threshold", [0.15, 0.55, 0.75, 9.0])
def test_decisions_are_those_of_the_rule(threshold):
    expected, total = [], 0.0
    for i, change in enumerate(TABLE.astype(np.float32)):
        total += change
        compute = i <= 1 or total >= np.float32(threshold) or i == STEPS - 1
        total = 0.0 if compute else total
        expected.append(compute)
    np.testing.assert_array_equal(computed(traced(threshold)[1]), [expected] * CHUNKS)


def test_a_threshold_of_zero_is_the_engine_without_reuse():
    exact, _ = jax.jit(lambda: sample_chunks(DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE))()
    np.testing.assert_array_equal(traced(0.0)[0], exact)


def test_the_embedded_distance_looks_at_the_last_step_computed_or_not():
    distance = embedded()
    h = [jnp.full((1, 2, 3), v) for v in (1.0, 2.0, 2.5)]
    state = distance.init(h[0])
    found = []
    for x in h:
        change, state = distance.measure(state, None, x)
        found.append(float(change))
    np.testing.assert_allclose(found[1:], [1.0, 0.25], rtol=1e-6)


def test_time_distances_are_a_table_and_pass_the_polynomial():
    x = NOISE[:, 0]
    plain = time_table(DENOISER, PARAMS, x, None, SOLVER)
    assert plain.shape == (STEPS,) and plain[0] == 0 and (plain[1:] > 0).all()
    np.testing.assert_allclose(
        time_table(DENOISER, PARAMS, x, None, SOLVER, polynomial=(2.0, 1.0))[1:], 2 * plain[1:] + 1
    )


@pytest.mark.parametrize(
    "policy, expected",
    [
        (uniform(2), [1, 0, 1, 0, 1, 0]),
        (uniform(3, warmup=1), [1, 1, 0, 0, 1, 0]),
        (teacache(np.inf, tabled(TABLE)), [1, 0, 0, 0, 0, 1]),
        (flowcache(np.inf, tabled(TABLE), warmup=2, force_last=False), [1, 1, 1, 0, 0, 0]),
    ],
)
def test_forced_steps(policy, expected):
    run = jax.jit(lambda: sample_chunks(DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE, policy=policy)[1])
    np.testing.assert_array_equal(computed(run()), [np.array(expected, bool)] * CHUNKS)


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="warmup"):
        flowcache(0.1, tabled(TABLE), warmup=-1)
    with pytest.raises(ValueError, match="interval >= 1"):
        uniform(0)
    with pytest.raises(ValueError, match="one finite number per step"):
        tabled(np.array([0.0, np.nan]))


def cache(seed=0, length=12):
    keys = jax.random.split(jax.random.key(seed), 3)
    return ChunkKV(*(jax.random.normal(key, (2, 1, length, 2, 4)) for key in keys))


def test_compression_scores_are_those_of_the_formula():
    kv, budget = cache(), 5
    kept = jax.jit(lambda kv: compress_cache(kv, budget))(kv)
    key, query = np.asarray(kv.key, np.float64), np.asarray(kv.query, np.float64)
    for layer, head in ((0, 0), (1, 1)):
        k, q = key[layer, 0, :, head], query[layer, 0, :, head]
        weight = np.exp(q @ k.T / 2)
        weight = (weight / weight.sum(1, keepdims=True)).mean(0)
        pooled = np.array([weight[max(i - 3, 0) : i + 4].max() for i in range(12)])
        unit = k / np.linalg.norm(k, axis=1, keepdims=True)
        cosine = (unit @ unit.sum(0) - 1) / 12
        score = 0.07 * pooled - 0.93 * np.exp(cosine) / np.exp(cosine).sum()
        best = np.sort(np.argsort(-score)[:budget])
        np.testing.assert_allclose(kept.key[layer, 0, :, head], k[best], rtol=1e-5)
        np.testing.assert_allclose(kept.value[layer, 0, :, head], kv.value[layer, 0, best, head])


def test_a_repeated_key_goes_first():
    kv = cache(length=6)
    kv = kv._replace(key=kv.key.at[:, :, 3:].set(kv.key[:, :, 3:4]))
    kept = jax.jit(lambda kv: compress_cache(kv, 3, importance=0.0))(kv)
    same = jnp.abs(kept.key - kv.key[:, :, 3:4]).max(-1) < 1e-6
    assert int(same.sum(2).max()) <= 1 or float(same.mean()) < 0.5


@pytest.mark.parametrize("options", [dict(budget=0), dict(budget=13), dict(budget=3, window=4)])
def test_bad_budgets_are_refused(options):
    with pytest.raises(ValueError, match=r"a budget within 1\.\.12"):
        compress_cache(cache(), **options)
