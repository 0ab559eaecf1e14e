"""Chunk-wise autoregressive sampling as one program: a scan over the rows of a schedule, with all state in its carry.

    x_g --embed--> h --trunk on the tokens that the policy wants--> h' --head--> F --solver--> x_g of its next step
                        keys and values of the chunks before, each of its own last forward

A chunk that rests in a row, and a step that wants no token, run nothing (`lax.cond`, `lax.switch`). Finished chunks are never run
again; with `compress` their cache is made smaller when they finish, and the scan goes on in a new segment with those shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.sampling.autoregressive.denoiser import ChunkDenoiser
from jaxcomp.sampling.autoregressive.policy import Seen, Step, TokenPolicy, every_step
from jaxcomp.sampling.autoregressive.reuse import Reuse, combine, empty_memory
from jaxcomp.sampling.autoregressive.schedule import ChunkSchedule, check_schedule
from jaxcomp.sampling.autoregressive.tokens import ALL_OR_NONE, Ladder, check_ladder, compute_tokens
from jaxcomp.sampling.solvers import LinearSolver, coefficients


class Branch(NamedTuple):
    """State of a chunk in one guidance branch: what stands in for left-out tokens, its keys and values, the policy's."""

    memory: Any
    cache: Any
    policy: Any


class ChunkState(NamedTuple):
    """State of a chunk: latents, the last p - 1 outputs of the solver (newest first), and its branches."""

    x: Float[Array, "B L C"]
    outputs: tuple[Array, ...]
    branches: tuple[Branch, ...]


class Trace(NamedTuple):
    """What a run did; chunks that were given are left out of G', and a resting chunk has zeros.

    Attributes:
      tokens: tokens per sample that ran through the trunk, by guidance branch R.
      wanted: tokens that the policy wanted, summed over samples.
      mask: the computed tokens.
      recorded: what `record` returned, with leading axes [rows, G', R].
    """

    tokens: Int[Array, "rows G' R"]
    wanted: Int[Array, "rows G' R"]
    mask: Bool[Array, "rows G' R B L"]
    recorded: Any


jax.export.register_namedtuple_serialization(Trace, serialized_name="jaxcomp.sampling.autoregressive.Trace")


class Engine(NamedTuple):
    """The fixed parts of a run; `conds` are the conditions of its guidance branches."""

    denoiser: ChunkDenoiser
    params: Any
    solver: LinearSolver
    policy: TokenPolicy
    ladder: Ladder
    reuse: Reuse
    conds: tuple[Any, ...]
    scale: float
    record: Callable[[Seen, Any], Any]


def sample_chunks(
    denoiser: ChunkDenoiser,
    params: Any,
    x: Float[Array, "B G L C"],
    cond: Any,
    solver: LinearSolver,
    schedule: ChunkSchedule,
    *,
    policy: TokenPolicy | None = None,
    ladder: Ladder = ALL_OR_NONE,
    reuse: Reuse = "residual",
    guidance: tuple[float, Any] | None = None,
    compress: Callable[[Any], Any] | None = None,
    record: Callable[[Seen, Any], Any] = lambda seen, state: (),
) -> tuple[Float[Array, "B G L C"], Trace]:
    """Integrates all chunks from noise to samples. Pure in its arrays: jit it, export it, shard x and cond over a data mesh.

    Args:
      denoiser: the network.
      params: its parameters.
      x: noise of standard deviation `solver.init_std`; of given chunks the clean tokens, which come back as they are.
      cond: what the denoiser takes, or None.
      solver: deterministic; every chunk has its own place on it.
      schedule: of as many chunks and steps.
      policy: which tokens to compute; all by default.
      ladder: capacities of the partial forward; a chunk step computes all tokens or none by default.
      reuse: what stands in for the others, see `autoregressive.reuse`.
      guidance: (scale, the condition that means "none") of classifier-free guidance, whose branches have states of their own.
      compress: makes the cache of a finished chunk smaller.
      record: `record(seen, policy state) -> pytree` of every chunk step, for the trace.

    Returns:
      (samples, trace).

    Raises:
      ValueError: an empty batch, latents that are not finite (where they are known), a solver that draws noise or does not
        suit `reuse`, a schedule for another number of chunks or steps, capacities out of range, or guidance without the
        condition that means "none".
    """
    _check(x, solver, schedule, reuse, guidance)
    conds, scale = ((cond,), 1.0) if guidance is None else ((cond, guidance[1]), guidance[0])
    check_ladder(ladder, x.shape[2])
    engine = Engine(denoiser, params, solver, policy or every_step(), ladder, reuse, conds, scale, record)
    state, finished, traces = _initial(engine, x, schedule.prefix), schedule.finished(), []
    for start, stop in _segments(schedule, bool(compress)):
        if compress:
            state = tuple(_compressed(c, compress) if finished[g] == start else c for g, c in enumerate(state))
        rows = schedule.step[start:stop]
        moving = tuple(g for g in range(schedule.chunks) if (rows[:, g] >= 0).any())
        state, trace = jax.lax.scan(lambda s, row, m=moving: _row(engine, s, row, m, schedule.prefix), state, rows)
        traces.append(trace)
    trace = jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)
    return jnp.stack([chunk.x for chunk in state], axis=1), trace


def _segments(schedule: ChunkSchedule, at_finishes: bool) -> list[tuple[int, int]]:
    """(start, stop) of the scans: all rows, or those between two rows after which a chunk is finished."""
    rows = len(schedule.step)
    inner = {int(row) for row in schedule.finished() if 0 < row < rows} if at_finishes else ()
    return list(itertools.pairwise([0, *sorted(inner), rows]))


def _check(x, solver: LinearSolver, schedule: ChunkSchedule, reuse: str, guidance: Any) -> None:
    if x.ndim != 4 or x.shape[0] == 0:
        raise ValueError(f"x: expected latents [B, G, L, C] of at least 1 sample, found shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        raise ValueError("x: expected finite latents, found NaN or infinity; check the noise and the given chunks")
    if solver.stochastic:
        raise ValueError(f"{solver.name} draws noise at its steps; chunks are sampled with a deterministic solver")
    check_schedule(schedule, x.shape[1], solver.steps)
    if reuse not in ("residual", "output", "displacement"):
        raise ValueError(f"reuse {reuse!r} is unknown; expected 'residual', 'output' or 'displacement'")
    if reuse == "displacement" and (solver.b.shape[1] > 1 or not np.all(np.asarray(solver.a) == 1)):
        raise ValueError(
            f"a displacement can be reused with euler_flow only, found {solver.name}; reuse 'output' instead"
        )
    if guidance is not None and guidance[1] is None:
        raise ValueError("guidance needs the condition that means 'none', as used in training; found None")


def _initial(engine: Engine, x: Array, prefix: int) -> tuple[ChunkState, ...]:
    """The state before the first row; the chunks that are given run once, at noise level 0, for their keys and values."""
    state: tuple[ChunkState, ...] = ()
    for g in range(x.shape[1]):
        chunk, outputs = x[:, g], (jnp.zeros_like(x[:, g]),) * (engine.solver.b.shape[1] - 1)
        branches = []
        for b, cond in enumerate(engine.conds):
            time = jnp.zeros(x.shape[:1], jnp.float32)
            h, c = engine.denoiser.embed(engine.params, chunk, time, cond)
            cache = engine.denoiser.cache(x.shape[0])
            seen = Seen(h, chunk, chunk)
            policy = engine.policy.init(h, seen)
            if g < prefix:
                caches = (*(s.branches[b].cache for s in state), cache)
                hidden, cache = engine.denoiser.trunk(engine.params, h, c, caches, None)
                step = Step(jnp.int32(0), jnp.array(False), g)
                before = state[-1].branches[b].policy if state else None
                everything = jnp.ones(h.shape[:2], bool)
                policy = engine.policy.observe(policy, step, everything, seen._replace(hidden=hidden), before)
            branches.append(Branch(empty_memory(engine.reuse, h, chunk), cache, policy))
        state = (*state, ChunkState(chunk, outputs, tuple(branches)))
    return state


def _compressed(chunk: ChunkState, compress: Callable[[Any], Any]) -> ChunkState:
    return chunk._replace(branches=tuple(b._replace(cache=compress(b.cache)) for b in chunk.branches))


def _row(
    engine: Engine, state: tuple[ChunkState, ...], row: Int[Array, "G"], moving: tuple[int, ...], prefix: int
) -> tuple[Any, Trace]:
    """One row of the schedule, in which only the chunks of `moving` may step."""
    update = lambda g: lambda chunk, earlier: _update(engine, chunk, earlier, row[g])
    first = moving[0]
    shapes = jax.eval_shape(update(first), state[first], state[:first])[1]
    rest = lambda chunk, earlier: (chunk, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes))
    traces = []
    for g in range(prefix, len(state)):
        if g in moving:
            chunk, trace = jax.lax.cond(row[g] >= 0, update(g), rest, state[g], state[:g])
        else:
            chunk, trace = rest(state[g], state[:g])
        state = (*state[:g], chunk, *state[g + 1 :])
        traces.append(trace)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *traces)


def _update(engine: Engine, chunk: ChunkState, earlier: tuple[ChunkState, ...], i: Array) -> tuple[ChunkState, Trace]:
    """One inference step of a chunk."""
    k = coefficients(engine.solver, i, chunk.x.dtype)
    step = Step(i, i == engine.solver.steps - 1, len(earlier))
    passes = [_forward(engine, chunk, earlier, b, step, k) for b in range(len(engine.conds))]
    out = passes[0].out
    if len(passes) > 1:
        out = passes[1].out + jnp.asarray(engine.scale, out.dtype) * (out - passes[1].out)
    output = k.skip * chunk.x + k.gain * out
    outputs = (output, *chunk.outputs)
    x = k.a * chunk.x + sum(k.b[j] * o for j, o in enumerate(outputs))
    keep, add = _to_the_end(engine.solver)
    x0 = keep[i].astype(x.dtype) * chunk.x + add[i].astype(x.dtype) * output
    branches, traces = [], []
    for b, done in enumerate(passes):
        before = earlier[-1].branches[b].policy if earlier else None
        seen = Seen(done.hidden, x0, x)
        policy = engine.policy.observe(done.branch.policy, step, done.mask, seen, before)
        branches.append(done.branch._replace(policy=policy))
        traces.append(Trace(done.tokens, done.wanted, done.mask, engine.record(seen, policy)))
    state = ChunkState(x, outputs[:-1], tuple(branches))
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *traces)


class _Pass(NamedTuple):
    branch: Branch
    out: Array
    hidden: Array
    tokens: Array
    wanted: Array
    mask: Array


def _forward(
    engine: Engine, chunk: ChunkState, earlier: tuple[ChunkState, ...], b: int, step: Step, k: LinearSolver
) -> _Pass:
    """The network's output for a chunk in one guidance branch, some of its tokens computed and the others recalled."""
    branch, params, denoiser = chunk.branches[b], engine.params, engine.denoiser
    time = jnp.broadcast_to(k.t, chunk.x.shape[:1])
    h, c = denoiser.embed(params, k.in_scale * chunk.x, time, engine.conds[b])
    wanted, policy = engine.policy.decide(branch.policy, step, h)
    before = tuple(e.branches[b].cache for e in earlier)
    trunk = lambda h, cache, index: denoiser.trunk(params, h, c, (*before, cache), index)
    done = compute_tokens(trunk, h, branch.cache, wanted, engine.ladder)
    head = lambda hidden: denoiser.head(params, hidden, c).astype(chunk.x.dtype)
    hidden, out, memory = combine(engine.reuse, branch.memory, h, done, head, k.b[0])
    count = wanted.need.sum(dtype=jnp.int32)
    return _Pass(Branch(memory, done.cache, policy), out, hidden, done.tokens, count, done.mask)


def _to_the_end(solver: LinearSolver) -> tuple[Array, Array]:
    """(keep, add): x_T = keep_i x_i + add_i o if the output stays o from step i on."""
    a, b = jnp.asarray(solver.a), jnp.asarray(solver.b).sum(1)
    after = jnp.append(jnp.cumprod(a[::-1])[::-1], 1.0)
    return after[:-1], jnp.cumsum((after[1:] * b)[::-1])[::-1]
