"""The engine: equal to a loop over whole forwards, frozen chunks, guidance, sharding, and what it refuses."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_video import BATCH, CHUNKS, CONFIG, DENOISER, LEVELS, MODEL, NOISE, PARAMS, SOLVER, STEPS

from jaxcomp.sampling.autoregressive import (
    ladder,
    sample_chunks,
    sequence_velocity,
    staggered,
)
from jaxcomp.sampling.autoregressive.policy import TokenPolicy
from jaxcomp.sampling.autoregressive.tokens import Wanted
from jaxcomp.sampling.cache.flowcache import compress_cache
from jaxcomp.sampling.schedules import flow_grid, linear_betas, vp_grid
from jaxcomp.sampling.solvers import ddpm, dpmpp_2m, euler_flow

LABEL = jnp.array([0, 2])


def run(schedule, x=NOISE, cond=LABEL, **options):
    return jax.jit(lambda p, x: sample_chunks(DENOISER, p, x, cond, SOLVER, schedule, **options))(PARAMS, x)


def scattered():
    """Wants every token at step 0, then a third of them by turns."""

    def decide(state, step, h):
        turn = (jnp.arange(h.shape[1]) + step.index) % 3 == 0
        need = jnp.broadcast_to(turn[None] | (step.index == 0), h.shape[:2])
        return Wanted(need, jnp.zeros(h.shape[:2])), state

    return TokenPolicy(lambda h, seen: (), decide, lambda state, step, computed, seen, before: state)


@pytest.mark.parametrize("stagger", [0, 2, STEPS])
def test_it_is_a_loop_over_forwards_of_all_chunks(stagger):
    """Chunks that move together see each other as they are; a finished one as it was in its last forward."""
    found, trace = run(staggered(CHUNKS, STEPS, stagger))
    level = jax.jit(lambda x, t: sequence_velocity(DENOISER, PARAMS, x, t, LABEL))
    x, told, seen = np.array(NOISE), np.full(CHUNKS, 1.0, np.float32), np.array(NOISE)
    for row in staggered(CHUNKS, STEPS, stagger).step:
        for g in np.flatnonzero(row >= 0):
            told[g], seen[:, g] = LEVELS.sigma[row[g]], x[:, g]
            velocity = np.asarray(level(jnp.asarray(seen), jnp.asarray(told)))[:, g]
            x[:, g] += np.float32(LEVELS.sigma[row[g] + 1] - LEVELS.sigma[row[g]]) * velocity
    np.testing.assert_allclose(found, x, atol=2e-4)
    assert int(trace.tokens.sum()) == CHUNKS * STEPS * CONFIG.chunk_tokens and bool(
        (trace.mask.sum((2, 4)).max(1) > 0).all()
    )


def test_all_chunks_at_once_are_the_monolithic_model():
    """Without stagger or reuse the last row's velocity is that of the block-causal model on all chunks."""
    levels = flow_grid(1, time_scale=1.0)
    one = jax.jit(lambda p, x: sample_chunks(DENOISER, p, x, LABEL, euler_flow(levels), staggered(CHUNKS, 1, 0))[0])
    velocity = jax.jit(lambda p, x: MODEL.apply({"params": p}, x, jnp.ones((BATCH, CHUNKS)), LABEL))
    np.testing.assert_allclose(one(PARAMS, NOISE), NOISE - velocity(PARAMS, NOISE), atol=1e-4)


@pytest.mark.parametrize("reuse", ["residual", "output", "displacement"])
def test_left_out_tokens_reuse_and_the_trace_counts_them(reuse):
    schedule = staggered(CHUNKS, STEPS, 2)
    exact, _ = run(schedule)
    found, trace = run(schedule, policy=scattered(), ladder=ladder(CONFIG.chunk_tokens, (0.5,)), reuse=reuse)
    active = schedule.step >= 0
    sizes = np.where(schedule.step == 0, CONFIG.chunk_tokens, np.where(active, CONFIG.chunk_tokens // 2, 0))
    np.testing.assert_array_equal(trace.tokens[..., 0], sizes)
    np.testing.assert_array_equal(trace.mask[:, :, 0].sum(-1)[..., 0], sizes)
    assert 1e-3 < float(jnp.abs(found - exact).max()) < 20


@pytest.mark.parametrize("reuse", ["residual", "output", "displacement"])
def test_a_step_that_wants_all_tokens_is_exact_for_every_reuse(reuse):
    schedule = staggered(CHUNKS, STEPS, 2)
    found, _ = run(schedule, reuse=reuse, ladder=ladder(CONFIG.chunk_tokens, (0.5,)))
    np.testing.assert_allclose(found, run(schedule)[0], atol=1e-5)


def test_given_chunks_come_back_and_are_seen():
    schedule = staggered(CHUNKS, STEPS, STEPS, prefix=1)
    found, trace = run(schedule)
    other, _ = run(schedule, x=NOISE.at[:, 0].add(0.5))
    np.testing.assert_array_equal(found[:, 0], NOISE[:, 0])
    assert trace.tokens.shape == (STEPS, 1, 1)
    assert float(jnp.abs(found[:, 1] - other[:, 1]).max()) > 1e-3


def test_guidance_has_branches_of_its_own():
    """A scale of 1 is the conditional model, of 0 the unconditional one; the trace counts both branches."""
    schedule, none = staggered(CHUNKS, STEPS, 2), jnp.full((BATCH,), CONFIG.classes)
    for scale, cond in ((1.0, LABEL), (0.0, none)):
        found, trace = run(schedule, guidance=(scale, none))
        np.testing.assert_allclose(found, run(schedule, cond=cond)[0], atol=1e-4)
    assert trace.tokens.shape[2] == 2 and int(trace.tokens.sum()) == 2 * schedule.updates * CONFIG.chunk_tokens


def test_multistep_solvers_keep_their_history_per_chunk():
    """Chunk 0 does not depend on the others: alone it comes out the same."""
    solver = dpmpp_2m(flow_grid(STEPS, 2.0, time_scale=1.0), "flow")
    both = jax.jit(lambda x: sample_chunks(DENOISER, PARAMS, x, LABEL, solver, staggered(2, STEPS, 2))[0])(NOISE)
    alone = jax.jit(lambda x: sample_chunks(DENOISER, PARAMS, x, LABEL, solver, staggered(1, STEPS, 2))[0])(
        NOISE[:, :1]
    )
    np.testing.assert_allclose(both[:, :1], alone, atol=1e-5)


def test_a_cache_that_is_compressed_to_itself_changes_nothing_and_a_smaller_one_little():
    schedule = staggered(CHUNKS, STEPS, 3)
    exact, _ = run(schedule)
    same, _ = run(schedule, compress=lambda cache: compress_cache(cache, CONFIG.chunk_tokens))
    np.testing.assert_allclose(same, exact, atol=1e-5)
    half, _ = run(schedule, compress=lambda cache: compress_cache(cache, CONFIG.chunk_tokens // 2))
    np.testing.assert_array_equal(half[:, 0], exact[:, 0])
    assert 0 < float(jnp.abs(half - exact).max())


def test_sharded_over_devices_it_samples_the_same():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    schedule = staggered(CHUNKS, STEPS, 2)
    options = dict(policy=scattered(), ladder=ladder(CONFIG.chunk_tokens, (0.5,)))
    split, _ = run(schedule, x=jax.device_put(NOISE, sharding), **options)
    np.testing.assert_allclose(split, run(schedule, **options)[0], atol=1e-5)


def test_export_round_trip():
    pytest.importorskip("flatbuffers")
    options = dict(policy=scattered(), ladder=ladder(CONFIG.chunk_tokens, (0.5,)))
    schedule = staggered(CHUNKS, STEPS, 2)
    fn = jax.jit(lambda p, x: sample_chunks(DENOISER, p, x, LABEL, SOLVER, schedule, **options))
    again = jax.export.deserialize(jax.export.export(fn)(PARAMS, NOISE).serialize())
    for found, wanted in zip(
        jax.tree.leaves(again.call(PARAMS, NOISE)), jax.tree.leaves(fn(PARAMS, NOISE)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_bad_input_says_what_is_wrong():
    schedule = staggered(CHUNKS, STEPS, 2)
    call = lambda x=NOISE, solver=SOLVER, schedule=schedule, **o: sample_chunks(
        DENOISER, PARAMS, x, None, solver, schedule, **o
    )
    with pytest.raises(ValueError, match="finite latents, found NaN"):
        call(NOISE.at[0, 0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="at least 1 sample, found shape"):
        call(NOISE[:0])
    with pytest.raises(ValueError, match=r"expected 2 chunks of 6 steps .* found one for 3 chunks of 6"):
        call(schedule=staggered(3, STEPS, 2))
    with pytest.raises(ValueError, match="deterministic solver"):
        call(solver=ddpm(vp_grid(linear_betas(), STEPS)))
    with pytest.raises(ValueError, match="reuse 'output' instead"):
        call(solver=dpmpp_2m(LEVELS, "flow"), reuse="displacement")
    with pytest.raises(ValueError, match="reuse 'nothing' is unknown"):
        call(reuse="nothing")
    with pytest.raises(ValueError, match="condition that means 'none'"):
        call(guidance=(2.0, None))
    with pytest.raises(ValueError, match="capacities must rise"):
        call(ladder=ladder(CONFIG.chunk_tokens, (0.5,))._replace(capacities=(0,)))
