"""Where the token caches are tried: a field whose denoiser is exact, and the trained video model; and how they are scored."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxcomp.data.embedded_video import FOLDER, load_video_dit
from jaxcomp.data.shapes import MovingField, random_field, random_scene, render
from jaxcomp.models.video_dit import VideoDiTConfig, patchify
from jaxcomp.sampling.autoregressive import (
    ChunkDenoiser,
    ChunkSchedule,
    Seen,
    Step,
    TokenPolicy,
    field_denoiser,
    ladder,
    output_table,
    sample_chunks,
    staggered,
    tabled,
    video_denoiser,
)
from jaxcomp.sampling.cache.flowcache import flowcache, teacache, uniform
from jaxcomp.sampling.cache.motioncache import MAGI, PAPER, SKYREELS, MotionCacheConfig, motioncache
from jaxcomp.sampling.schedules import flow_grid
from jaxcomp.sampling.solvers import LinearSolver, euler_flow


class Method(NamedTuple):
    """A token cache but for its threshold; `floor` may vary without another compilation."""

    kind: str  # "uniform", "teacache", "flowcache" or "motioncache"
    config: MotionCacheConfig = SKYREELS
    proxy: str = ""  # in place of the config's: "x0", "random" or "oracle"
    floor: float = 0.6


class World(NamedTuple):
    """A denoiser and what is sampled with it; videos are sampled one by one, so that their caches decide for themselves.

    Attributes:
      denoiser: cut for token caches.
      params: of the denoiser; with a leading axis of videos if `own_params`.
      own_params: see above.
      x: noise; of given chunks the clean tokens.
      cond: labels, or None.
      solver: Euler steps.
      plan: arguments of `staggered`.
      shares: capacities of the partial forward.
      span: largest minus smallest value of the data, for PSNR.
    """

    denoiser: ChunkDenoiser
    params: Any
    own_params: bool
    x: Float[Array, "V G L C"]
    cond: Any
    solver: LinearSolver
    plan: tuple[int, int, int, int]
    shares: tuple[float, ...]
    span: float

    @property
    def schedule(self) -> ChunkSchedule:
        """Of the chunks."""
        return staggered(*self.plan)


class Reference(NamedTuple):
    """The uncached run, and what is known from it.

    Attributes:
      x: samples.
      table: distance of every step to the one before, over all videos and chunks.
      change: of every token's output at every step, for the oracle.
    """

    x: Float[np.ndarray, "V G L C"]
    table: Float[np.ndarray, "n"]
    change: Float[np.ndarray, "V G n L"]


class Score(NamedTuple):
    """Share of all tokens that were computed, mean over videos, and PSNR of each video to the uncached run in dB."""

    share: float
    psnr: Float[np.ndarray, "V"]


def methods(config: ConfigDict) -> dict[str, Method]:
    """The methods under comparison, by name."""
    tokenwise = MotionCacheConfig(coarse=0, relative=False, vote=None, min_share=0.0)
    found = {
        "uniform": Method("uniform"),
        "TeaCache": Method("teacache"),
        "FlowCache": Method("flowcache"),
        "MotionCache (SkyReels-V2 program)": Method("motioncache", SKYREELS),
        "MotionCache (MAGI-1 program)": Method("motioncache", MAGI),
        "MotionCache (paper's equations)": Method("motioncache", PAPER),
    }
    for floor in config.floors:
        found[f"MotionCache, x0 estimate, alpha {floor}"] = Method("motioncache", tokenwise, "x0", floor)
        for warmup, coarse in config.get("phases", ()):
            name = f"MotionCache, x0 estimate, alpha {floor}, steps 0..{warmup} full, K = {coarse}"
            phases = dataclasses.replace(tokenwise, warmup=warmup, coarse=coarse)
            found[name] = Method("motioncache", phases, "x0", floor)
    for floor in config.control_floors:
        found[f"random tokens, alpha {floor}"] = Method("motioncache", tokenwise, "random", floor)
        found[f"latent differences, alpha {floor}"] = Method("motioncache", tokenwise, "latent", floor)
        found[f"oracle tokens, alpha {floor}"] = Method("motioncache", tokenwise, "oracle", floor)
    return found


def field_world(config: ConfigDict, seed: int) -> World:
    """The exact field: one chunk, three quarters of its tokens still."""
    f = config.field
    field = random_field(jax.random.key(seed), f.videos, f.frames, f.tokens, f.channels, dynamic=f.dynamic)
    x = jax.random.normal(jax.random.key(seed + 1000), (f.videos, 1, f.frames * f.tokens, f.channels))
    fields = MovingField(field.modes[:, None], jnp.broadcast_to(field.std, (f.videos, 1)))
    solver, plan = euler_flow(flow_grid(f.steps, f.shift, time_scale=1.0)), (1, f.steps, f.steps, 0)
    return World(_field_denoiser(f.frames), fields, True, x, None, solver, plan, tuple(f.shares), f.span)


def video_world(
    config: ConfigDict, seed: int, moving_camera: bool, folder: pathlib.Path = FOLDER, kind: int | None = None
) -> World:
    """The trained model going on with `given` chunks of shapes, of one kind or of random ones."""
    v, (denoiser, size, params) = config.video, video_model(folder)
    keys = jax.random.split(jax.random.key(seed), 2)
    scene = random_scene(keys[0], v.videos, size.size, float(moving_camera))
    scene = scene if kind is None else scene._replace(kind=jnp.full_like(scene.kind, kind))
    given = patchify(render(scene, v.given * size.frames, size.size), size)
    noise = jax.random.normal(keys[1], (v.videos, v.chunks - v.given, *given.shape[2:]))
    solver, plan = euler_flow(flow_grid(v.steps, v.shift, time_scale=1.0)), (v.chunks, v.steps, v.stagger, v.given)
    x = jnp.concatenate([given, noise], 1)
    return World(denoiser, params, False, x, scene.kind, solver, plan, tuple(v.shares), 2.0)


_field_denoiser = functools.cache(field_denoiser)


@functools.cache
def video_model(folder: pathlib.Path = FOLDER) -> tuple[ChunkDenoiser, VideoDiTConfig, Any]:
    """The shipped model, or that of another folder: (denoiser, sizes, params)."""
    model, params = load_video_dit(folder)
    return video_denoiser(model), model.config, params


def policy_of(
    method: Method, threshold: Array, floor: Array, table: Array, change: Float[Array, "G n L"], frames: int
) -> TokenPolicy:
    """The policy of one video."""
    distance = tabled(table)
    if method.kind == "uniform":
        return uniform(jnp.round(threshold).astype(jnp.int32))
    if method.kind != "motioncache":
        return {"teacache": teacache, "flowcache": flowcache}[method.kind](threshold, distance)

    def drawn(seen: Seen, step: Step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step.chunk), step.index)
        return jax.random.uniform(key, (1, frames, seen.x0.shape[1] // frames))

    def known(seen: Seen, step: Step):
        return change[step.chunk, step.index].reshape(1, frames, -1)

    changes = {"proxy": {"random": drawn, "oracle": known}.get(method.proxy, method.proxy)} if method.proxy else {}
    changes |= {"floor": floor} if method.proxy else {}
    return motioncache(threshold, distance, frames, dataclasses.replace(method.config, **changes))


def reference(world: World) -> Reference:
    """Samples all videos without reuse."""
    run = _uncached(world.denoiser, world.plan, world.own_params)
    x, latents = run(world.params, world.x, world.cond, world.solver)
    latents, levels = np.asarray(latents, np.float64), 1 + np.cumsum(np.append(0.0, np.asarray(world.solver.b)[:, 0]))
    velocity = np.diff(latents, axis=2) / np.diff(levels)[:, None, None]  # [V G' n L C]
    change = np.abs(np.diff(velocity, axis=2, prepend=velocity[:, :, :1])).mean(-1)
    given = np.zeros((len(x), world.schedule.prefix, *change.shape[2:]))
    change = np.concatenate([given, change], 1).astype(np.float32)
    return Reference(np.asarray(x), output_table(np.moveaxis(latents, 2, 0), levels), change)


def run(
    world: World, found: Reference, method: Method, reuse: str, threshold: float
) -> tuple[Float[np.ndarray, "V G L C"], float]:
    """(samples with a cache, share of all tokens that were computed)."""
    cached = _cached(world.denoiser, world.plan, world.own_params, world.shares, method._replace(floor=0.0), reuse)
    numbers = (jnp.float32(threshold), jnp.float32(method.floor), jnp.asarray(found.table, jnp.float32))
    x, tokens = cached(world.params, world.x, world.cond, world.solver, found.change, *numbers)
    return np.asarray(x), float(np.mean(tokens)) / (world.schedule.updates * world.x.shape[2])


def score(world: World, found: Reference, method: Method, reuse: str, threshold: float) -> Score:
    """Samples all videos with a cache and compares them with the uncached ones."""
    x, share = run(world, found, method, reuse, threshold)
    generated = slice(world.schedule.prefix, None)
    error = np.square(x[:, generated] - found.x[:, generated]).mean((1, 2, 3))
    return Score(share, 10 * np.log10(world.span**2 / np.maximum(error, 1e-12)))


@functools.cache
def _uncached(denoiser: ChunkDenoiser, plan: tuple[int, ...], own_params: bool) -> Callable[..., Any]:
    """Jitted (params, x, cond, solver) -> (samples [V G L C], latents of the generated chunks [V G' n+1 L C])."""
    schedule = staggered(*plan)
    rows = [np.flatnonzero(schedule.step[:, g] >= 0) for g in range(schedule.prefix, schedule.chunks)]

    def one(params, x, cond, solver):
        keep = lambda seen, state: seen.latent
        out, trace = sample_chunks(denoiser, params, x, cond, solver, schedule, record=keep)
        kept = jnp.stack([trace.recorded[row, g, 0, 0] for g, row in enumerate(rows)])
        return out[0], jnp.concatenate([x[0, schedule.prefix :, None], kept], 1)

    return _each(one, own_params)


@functools.cache
def _cached(
    denoiser: ChunkDenoiser,
    plan: tuple[int, ...],
    own_params: bool,
    shares: tuple[float, ...],
    method: Method,
    reuse: str,
) -> Callable[..., Any]:
    """Jitted (params, x, cond, solver, change, threshold, floor, table) -> (samples, computed tokens [V])."""
    schedule = staggered(*plan)

    def one(params, x, cond, solver, change, threshold, floor, table):
        policy = policy_of(method, threshold, floor, table, change[0], denoiser.frames)
        options = dict(policy=policy, ladder=ladder(x.shape[2], shares), reuse=reuse)
        out, trace = sample_chunks(denoiser, params, x, cond, solver, schedule, **options)
        return out[0], trace.tokens.sum()

    return _each(one, own_params)


def _each(one: Callable[..., Any], own_params: bool) -> Callable[..., Any]:
    """Runs `one` on batches of a single video, one after the other."""

    @jax.jit
    def run(params, x, cond, solver, *rest):
        change, numbers = (rest[:1], rest[1:]) if rest else ((), ())
        single = lambda tree: jax.tree.map(lambda v: v[None], tree)

        def body(video):
            own, x, cond, change = video
            own = MovingField(own.modes, own.std[0]) if own_params else own
            return one(own if own_params else params, single(x), single(cond), solver, *single(change), *numbers)

        return jax.lax.map(body, (params if own_params else (), x, cond, change))

    return run


def best(scores: list[Score], budget: float) -> Score:
    """The score of the largest mean PSNR among those that compute no more than `budget` of the tokens.

    Raises:
      ValueError: there is none.
    """
    allowed = [s for s in scores if s.share <= budget + 1e-9]
    if not allowed:
        raise ValueError(f"no threshold computes at most {budget:.0%} of the tokens; add larger ones to the config")
    return max(allowed, key=lambda s: s.psnr.mean())


def thresholds(method: Method, ends: tuple[float, float], count: int, table: Float[np.ndarray, "n"]) -> np.ndarray:
    """Thresholds to try: intervals for "uniform", else shares of the sum of all distances."""
    if method.kind == "uniform":
        return np.arange(1, 9)
    return np.geomspace(*ends, count) * table.sum()
