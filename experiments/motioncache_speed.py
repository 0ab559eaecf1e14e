"""Wall time of token-wise updates: forwards of some tokens; whole runs of the plain model, the chunk engine, and with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.cards import current_device
from jaxcomp.evaluate.throughput import paired
from jaxcomp.models.video_dit import VideoDiT, VideoDiTConfig
from jaxcomp.sampling.autoregressive import (
    ChunkDenoiser,
    ladder,
    sample_chunks,
    sequence_velocity,
    staggered,
    tabled,
    video_denoiser,
)
from jaxcomp.sampling.cache.flowcache import flowcache
from jaxcomp.sampling.cache.motioncache import MotionCacheConfig, motioncache
from jaxcomp.sampling.schedules import flow_grid
from jaxcomp.sampling.solvers import euler_flow


def measure(config: ConfigDict) -> dict[str, Any]:
    """Interleaved times on a random model that computes rather than waits; JSON-able, {name: [value, low, high]}.

    "forward": time of a chunk's forward of some tokens over that of all; "run": time of the engine without reuse over others'.
    """
    sizes = {name: config[name] for name in ("width", "depth", "heads", "size", "patch", "frames")}
    model = VideoDiT(VideoDiTConfig(**sizes))
    tokens = model.config.chunk_tokens
    x = jax.random.normal(jax.random.key(0), (1, 2, tokens, model.config.token_channels))
    params = jax.jit(model.init)(jax.random.key(1), x, jnp.ones((1, 2)))["params"]
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params)
    denoiser = video_denoiser(model)
    forwards = paired(forward_functions(denoiser, params, x), config.rounds)
    runs = paired(run_functions(denoiser, params, x, config), config.run_rounds)
    ratio = lambda found, name, base: [float(1 / v) for v in np.array(found.speedup(name, base))[[0, 2, 1]]]
    device = f"{current_device()}, float32"
    return {
        "setting": f"chunks of {tokens} tokens, width {config.width}, {config.depth} blocks, {device}",
        "forward": {name: ratio(forwards, name, "all") for name in forwards.seconds if name != "all"},
        "run": {name: list(runs.speedup(name, ENGINE)) for name in runs.seconds if name != ENGINE},
        "load": list(forwards.load),
    }


ENGINE = "chunk engine without reuse"


def forward_functions(denoiser: ChunkDenoiser, params: Any, x: jax.Array) -> Mapping[str, Callable[[], Any]]:
    """Forwards of all tokens of the second chunk and of a half, a quarter and an eighth of them."""
    tokens = x.shape[2]
    h, c = denoiser.embed(params, x[:, 1], jnp.full((1,), 0.5), None)
    caches = (denoiser.cache(1), denoiser.cache(1))

    @jax.jit
    def forward(h, caches, index):
        part = h if index is None else jnp.take_along_axis(h, index[..., None], 1)
        out, cache = denoiser.trunk(params, part, c, caches, index)
        return out if index is None else h.at[0, index[0]].set(out[0], unique_indices=True), cache

    found = {"all": lambda: forward(h, caches, None)}
    for share in (2, 4, 8):
        index = jax.random.permutation(jax.random.key(share), tokens)[: tokens // share].sort()[None]
        found[f"1/{share} of the tokens"] = lambda i=index: forward(h, caches, i)
    return found


def run_functions(
    denoiser: ChunkDenoiser, params: Any, x: jax.Array, config: ConfigDict
) -> Mapping[str, Callable[[], Any]]:
    """Whole runs: all chunks in every row, the chunk engine, and the engine with two caches at the same compute."""
    steps, schedule = config.steps, staggered(2, config.steps, config.steps // 2)
    grid = flow_grid(steps, 3.0, time_scale=1.0)
    solver, even = euler_flow(grid), tabled(np.ones(steps))
    tokenwise = MotionCacheConfig(warmup=0, coarse=0, floor=0.0, proxy=_a_quarter, vote=None, min_share=0.0)

    @jax.jit
    def vanilla(x):
        def row(x, steps_now):
            level = jnp.asarray(grid.sigma, jnp.float32)
            t = level[jnp.maximum(steps_now, 0)]
            velocity = sequence_velocity(denoiser, params, x, t, None)
            length = jnp.where(steps_now >= 0, level[steps_now + 1] - t, 0.0)
            return x + length[None, :, None, None] * velocity, None

        return jax.lax.scan(row, x, jnp.asarray(schedule.step))[0]

    def engine(**options):
        return jax.jit(lambda x: sample_chunks(denoiser, params, x, None, solver, schedule, **options)[0])

    policies = {
        "FlowCache, every fourth step": dict(policy=flowcache(4.0, even, warmup=0, force_last=False)),
        "MotionCache, a quarter of the tokens per step": dict(
            policy=motioncache(1.0, even, denoiser.frames, tokenwise), ladder=ladder(x.shape[2], (0.25, 0.5))
        ),
    }
    runs = {"all chunks in every row": vanilla, ENGINE: engine()}
    runs |= {name: engine(**options) for name, options in policies.items()}
    return {name: lambda run=run: run(x) for name, run in runs.items()}


def _a_quarter(seen, step):
    """Motion of the places of one quarter of each frame, which so are computed at every step."""
    del step
    places = seen.x0.shape[1] // 4  # four frames
    return jnp.broadcast_to((jnp.arange(places) < places // 4).astype(jnp.float32), (seen.x0.shape[0], 4, places))
