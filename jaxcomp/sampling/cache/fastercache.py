"""FasterCache: attention outputs are extrapolated from two computed ones, and the unconditional branch of guidance is rebuilt
from the conditional one by differences kept apart for low and high frequencies.

Lv et al., ICLR 2025, arXiv 2410.19355; the frequency split and its weights as in maxdiffusion: rfft2, the lowest quarter of the
spectrum, stored differences that are not scaled again at each skipped step.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.sampling.denoiser import at_output, guided, module_outputs
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Store, at_step, cached, either, matches, planned


class Pair(NamedTuple):
    """The last computed output of a module, and the one before."""

    new: Float[Array, "..."]
    old: Float[Array, "..."]


def extrapolated(table: Bool[np.ndarray, "T"], weight: Float[np.ndarray, "T"], pattern: str) -> Store:
    """Attention outputs, computed where the table is True and o + w (o - o') elsewhere, o and o' the last two computed ones."""

    def init(run, h, c):
        _, kept = module_outputs(lambda around: run(h, c, around), pattern)
        return {name: Pair(v, v) for name, v in kept.items()}

    def compute(kept, run, h, c, i):
        new = {}
        w = jnp.asarray(at_step(weight, i), jnp.float32)

        def around(name, fn, v):
            if not matches(pattern, name):
                return fn(v)
            pair = kept[name]

            def fresh(v):
                out = fn(v)
                return out, Pair(out, pair.new)

            def guess(v):
                return pair.new + w.astype(pair.new.dtype) * (pair.new - pair.old), pair

            out, new[name] = either(at_step(table, i), fresh, guess, v)
            return out

        return run(h, c, around), new

    return Store(init, compute, compute)


def faster_attention(
    steps: int, timesteps: np.ndarray, below: float, weight: float | None, pattern: str
) -> CachePolicy:
    """Extrapolates every second step once the network's time is under `below`; `weight` None ramps from 0 to 1 over the run."""
    active = np.asarray(timesteps) < below
    table = ~active | (np.arange(steps) % 2 == 0)
    table[:3] = True  # two computed outputs come first
    weights = np.linspace(0.0, 1.0, steps) if weight is None else np.full(steps, weight)
    every = planned(lambda steps: np.ones(steps, bool))
    return cached(every, extrapolated(table, weights.astype(np.float32), pattern))


def split_frequencies(x: Float[Array, "B H W C"], cutoff: float = 0.25) -> tuple[Array, Array]:
    """(low, high) of rfft2 over the two axes before the last: |f| up to `cutoff` of the Nyquist frequency is low."""
    spectrum = jnp.fft.rfft2(x, axes=(-3, -2))
    rows = np.abs(np.fft.fftfreq(x.shape[-3]))[:, None] <= cutoff / 2
    columns = np.abs(np.fft.rfftfreq(x.shape[-2]))[None] <= cutoff / 2
    low = jnp.asarray(rows & columns, spectrum.dtype)[..., None]
    low = spectrum * low.reshape((1,) * (spectrum.ndim - 3) + low.shape)
    return low, spectrum - low


class Differences(NamedTuple):
    """F(uncond) - F(cond), low and high frequencies."""

    low: Array
    high: Array


def rebuilt_unconditional(
    steps: int, early: tuple[float, float] = (1.2, 1.0), late: tuple[float, float] = (1.0, 1.2)
) -> Store:
    """For a denoiser cut at its output with guidance: a skipped step runs the conditional half of the batch only.

    F(uncond) = F(cond) + w1 low + w2 high with (w1, w2) = `early` in the first half of the run, then `late`.
    """
    weights = np.where((np.arange(steps) < steps / 2)[:, None], np.float32(early), np.float32(late))

    def differences(out: Array) -> Differences:
        uncond, conditional = (split_frequencies(v) for v in jnp.split(out, 2))
        return Differences(*(a - b for a, b in zip(uncond, conditional, strict=True)))

    def compute(kept, run, h, c, i):
        out = run(h, c)
        return out, differences(out)

    def reuse(kept, run, h, c, i):
        half = lambda tree: jax.tree.map(lambda v: v[v.shape[0] // 2 :], tree)
        conditional = run(half(h), half(c))
        low, high = split_frequencies(conditional)
        w = jnp.asarray(at_step(weights, i))
        spectrum = low + w[0].astype(low.dtype) * kept.low + high + w[1].astype(low.dtype) * kept.high
        uncond = jnp.fft.irfft2(spectrum, s=conditional.shape[-3:-1], axes=(-3, -2)).astype(conditional.dtype)
        return jnp.concatenate([uncond, conditional]), kept

    return Store(lambda run, h, c: differences(run(h, c)), compute, reuse)


def faster_guidance(steps: int, interval: int = 5, start: int | None = None, **weights: Any) -> CachePolicy:
    """Both branches before step `start` (a third of the run by default) and at every `interval`-th step after it."""
    start = steps // 3 if start is None else max(start, 1)
    index = np.arange(steps)
    mask = (index < start) | ((index - start) % interval == 0)
    return cached(planned(mask), rebuilt_unconditional(steps, **weights))


@dataclasses.dataclass(frozen=True)
class FasterCacheConfig:
    """The attention part of FasterCache.

    Attributes:
      attention_weight: w; None ramps from 0 to 1.
      timestep_below: active where the network's time is below.
      pattern: names of the attention modules.
    """

    attention_weight: float | None = 0.5
    timestep_below: float = 681.0
    pattern: str = r"blocks_\d+/attn"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        solver = pipeline.solver
        policy = faster_attention(solver.steps, solver.t, self.timestep_below, self.attention_weight, self.pattern)
        return pipeline.replace(policy=policy)


@dataclasses.dataclass(frozen=True)
class FasterGuidanceConfig:
    """The guidance part of FasterCache, for a pipeline whose denoiser is not `guided` yet.

    Attributes:
      scale: guidance weight.
      null: the condition that means "none", an integer label or a tuple.
      interval: distance of steps that run both branches.
      start: first step that may skip; None is a third of the run.
      early: (low, high) frequency weights in the first half.
      late: in the second.
    """

    scale: float
    null: Any
    interval: int = 5
    start: int | None = None
    early: tuple[float, float] = (1.2, 1.0)
    late: tuple[float, float] = (1.0, 1.2)

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The guided pipeline with this cache."""
        options = dict(interval=self.interval, start=self.start, early=self.early, late=self.late)
        denoiser = guided(at_output(pipeline.denoiser), self.scale, self.null)
        return pipeline.replace(denoiser=denoiser, policy=faster_guidance(pipeline.solver.steps, **options))
