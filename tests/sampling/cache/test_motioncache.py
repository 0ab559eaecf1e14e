"""MotionCache: identities with FlowCache and the plain engine, its rule restated in numpy, and its claim on an exact field."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_video import BATCH, CHUNKS, CONFIG, DENOISER, NOISE, PARAMS, SOLVER, STEPS

from jaxcomp.sampling.autoregressive import ladder, sample_chunks, staggered, tabled
from jaxcomp.sampling.cache.flowcache import flowcache
from jaxcomp.sampling.cache.motioncache import (
    MAGI,
    PAPER,
    SKYREELS,
    MotionCacheConfig,
    frame_motion,
    motion_weights,
    motioncache,
    select,
)

SCHEDULE = staggered(CHUNKS, STEPS, 2)
TABLE = np.array([0.0, 0.3, 0.2, 0.5, 0.1, 0.4], np.float32)
TOKENS, FRAMES = CONFIG.chunk_tokens, CONFIG.frames
FREE = MotionCacheConfig(warmup=1, coarse=0, vote=None, min_share=0.0)


@functools.partial(jax.jit, static_argnames="config")
def run(threshold, config):
    policy = motioncache(threshold, tabled(TABLE), FRAMES, config)
    options = dict(policy=policy, ladder=ladder(TOKENS, (0.25, 0.5)), record=lambda seen, state: (seen, state))
    return sample_chunks(DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE, **options)


@jax.jit
def flow(threshold):
    policy = flowcache(threshold, tabled(TABLE), warmup=1, force_last=False)
    return sample_chunks(
        DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE, policy=policy, ladder=ladder(TOKENS, (0.25, 0.5))
    )


@pytest.mark.parametrize("changes", [dict(floor=1.0), dict(coarse=STEPS)])
@pytest.mark.parametrize("threshold", [0.25, 0.6])
def test_with_equal_weights_or_an_endless_coarse_phase_it_is_flowcache(changes, threshold):
    found, trace = run(threshold, dataclasses.replace(FREE, **changes))
    expected, other = flow(threshold)
    np.testing.assert_array_equal(trace.tokens, other.tokens)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("config", [FREE, dataclasses.replace(SKYREELS, warmup=1, coarse=1)])
def test_a_threshold_of_zero_is_the_engine_without_reuse(config):
    exact, _ = jax.jit(lambda: sample_chunks(DENOISER, PARAMS, NOISE, None, SOLVER, SCHEDULE))()
    found, trace = run(0.0, config)
    np.testing.assert_array_equal(found, exact)
    assert bool((trace.tokens.sum((0, 2)) == STEPS * TOKENS).all())


VARIANTS = {
    "free": FREE,
    "skyreels": dataclasses.replace(SKYREELS, warmup=1, coarse=1),
    "magi": dataclasses.replace(MAGI, warmup=0, coarse=2),
    "paper": dataclasses.replace(PAPER, warmup=0, coarse=1),
    "voted": dataclasses.replace(FREE, vote=0.4, min_share=0.3, proxy="x0"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_rule_restated_in_numpy(name):
    """Wanted tokens, accumulators, phases and weights, from the recorded hidden states, latents and x0 estimates."""
    config, threshold = VARIANTS[name], 0.35
    _, trace = run(threshold, config)
    seen, state = jax.tree.map(np.asarray, trace.recorded)
    last_frame = None
    for g in range(CHUNKS):
        rows = np.flatnonzero(SCHEDULE.step[:, g] >= 0)
        accumulated, weights = np.zeros((BATCH, TOKENS), np.float32), np.ones((BATCH, TOKENS), np.float32)
        fine, events = config.coarse == 0, 0
        for i, row in enumerate(rows):
            accumulated = accumulated + (weights if fine else 1.0) * TABLE[i]
            need = restated_need(accumulated, threshold, config)
            if i <= config.warmup or (config.force_last and i == STEPS - 1):
                need[:] = True
            assert int(trace.wanted[row, g, 0]) == need.sum()
            mask = np.asarray(trace.mask)[row, g, 0]
            assert (mask | ~need).all()
            accumulated[mask] = 0
            np.testing.assert_allclose(state.accumulated[row, g, 0], accumulated, atol=1e-6)
            events += bool(mask.any() and i > config.warmup and not fine)
            by_events = config.coarse_by == "computed"
            fine = (fine or events >= config.coarse) if by_events else i + 1 > config.warmup + config.coarse
            assert bool(state.fine[row, g, 0]) == fine
            z = getattr(seen, config.proxy)[row, g, 0].reshape(BATCH, FRAMES, TOKENS // FRAMES, -1)
            if fine:
                before = None if g == 0 else last_frame[min(row, len(last_frame) - 1)]
                weights = restated_weights(z, before, config)
                np.testing.assert_allclose(state.weights[row, g, 0], weights, atol=1e-4)
        last_frame = state.last_frame[:, g, 0].copy()
        for row in range(1, len(last_frame)):
            if SCHEDULE.step[row, g] < 0:
                last_frame[row] = last_frame[row - 1]


def restated_need(accumulated, threshold, config):
    need = accumulated > threshold if config.strict else accumulated >= np.float32(threshold)
    if config.vote is not None:
        place = need.reshape(BATCH, FRAMES, -1).mean(1) > config.vote
        need = np.tile(place, (1, FRAMES))
    share = need.mean(1)
    return need & (share >= config.min_share)[:, None]


def restated_weights(z, before, config):
    weights = np.ones((BATCH, FRAMES, z.shape[2]))
    for b in range(BATCH):
        motions = []
        for f in range(FRAMES):
            previous = z[b, f - 1] if f else (before[b] if before is not None else None)
            if previous is None:
                motions.append(None)
                continue
            motion = np.abs(z[b, f] - previous).mean(-1)
            motions.append(motion / (np.abs(previous).mean(-1) + 1e-8) if config.relative else motion)
        if motions[0] is None:
            motions[0] = motions[1]
        for f, motion in enumerate(motions):
            low, high = motion.min(), motion.max()
            weights[b, f] = config.floor + (1 - config.floor) * (motion - low) / (high - low + 1e-8)
        if before is None and config.first_frame == "one":
            weights[b, 0] = 1.0
    return weights.reshape(BATCH, -1)


def test_coarse_decisions_with_a_table_are_a_static_plan():
    """The same rows compute whatever the data: thresholds crossed by the cumulative table."""
    config = dataclasses.replace(FREE, coarse=STEPS)
    _, trace = run(0.6, config)
    total, plan = 0.0, []
    for i, change in enumerate(TABLE):
        total += change
        plan.append(i <= 1 or total >= np.float32(0.6))
        total = 0.0 if plan[-1] else total
    for g in range(CHUNKS):
        np.testing.assert_array_equal(trace.tokens[SCHEDULE.step[:, g] >= 0, g, 0] > 0, plan)


def test_one_moving_token_weighs_1_and_the_others_the_floor():
    z = jnp.zeros((1, 3, 5, 2)).at[0, 1, 3].set(1.0)
    weights = motion_weights(frame_motion(z, None, relative=False), 0.6)
    np.testing.assert_allclose(weights[0, 1], [0.6, 0.6, 0.6, 1.0, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(weights[0, 0], weights[0, 1])


@pytest.mark.parametrize("normalise", ["minmax", "max"])
def test_weights_lie_between_the_floor_and_1_and_alike_motion_weighs_1(normalise):
    motion = jax.random.uniform(jax.random.key(0), (2, 3, 16)).at[0, 0].set(0.7).at[0, 1].set(0.0)
    weights = jax.jit(motion_weights, static_argnums=2)(motion, 0.3, normalise)
    np.testing.assert_array_equal(weights[0, :2], 1.0)
    assert 0.3 <= float(weights.min()) and float(weights.max()) == pytest.approx(1.0)


def test_the_first_frame_of_a_chunk_is_compared_with_the_last_of_the_one_before():
    z, before = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 3, 4)).at[0, 1].set(3.0)
    np.testing.assert_allclose(frame_motion(z, before, False), [[[0, 2, 0], [0, 0, 0]]])
    np.testing.assert_allclose(frame_motion(z, before, True)[0, 0], [0, 2 / 3, 0], rtol=1e-5)


def test_a_cap_on_reuse_computes_the_tokens_that_wait_longest():
    accumulated = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    config = dataclasses.replace(FREE, max_reuse=0.5)
    np.testing.assert_array_equal(select(accumulated, 9.0, 2, config, 0), [[False, True, False, True]])
    by_step = dataclasses.replace(FREE, max_reuse=jnp.array([1.0, 0.0]))
    assert not select(accumulated, 9.0, 2, by_step, 0).any() and select(accumulated, 9.0, 2, by_step, 1).all()


def test_too_few_wanted_tokens_wait():
    accumulated = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    need = select(accumulated, 0.5, 2, dataclasses.replace(FREE, min_share=0.4), 0)
    np.testing.assert_array_equal(need, [[False] * 4, [True, True, False, False]])


@pytest.mark.parametrize(
    "options", [dict(floor=1.2), dict(vote=-0.1), dict(warmup=-1), dict(proxy="noise"), dict(coarse_by="hours")]
)
def test_bad_hyper_parameters_say_what_is_wrong(options):
    with pytest.raises(ValueError, match=r"MotionCache: .* found"):
        MotionCacheConfig(**options)
