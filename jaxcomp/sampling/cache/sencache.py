"""SenCache: an estimate of the output's change since the last computed step, from sensitivities to the latents and to time.

CVPR 2026, arXiv 2602.24208.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.sampling.denoiser import Denoiser
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import Decision, cached, residual


class Score(NamedTuple):
    """Latents and time of the step before; score and length of the present stretch of skipped steps."""

    x: Float[Array, "B ..."]
    t: Float[Array, ""]
    score: Float[Array, ""]
    run: Int[Array, ""]


def seeing_input(denoiser: Denoiser) -> Denoiser:
    """Adds the network's input and time to c, which becomes (c, x, t)."""

    def embed(params, x, t, cond):
        h, c = denoiser.embed(params, x, t, cond)
        return h, (c, x, t)

    return Denoiser(
        embed,
        lambda params, h, c, around: denoiser.trunk(params, h, c[0], around),
        lambda params, h, c: denoiser.head(params, h, c[0]),
    )


def sensitivity(
    steps: int, alpha_x: float, alpha_t: float, threshold: Any, max_run: int, first: float, last: float
) -> Decision:
    """Skips while alpha_x RMS(dx) + alpha_t |dt|, summed since the last computed step, stays within the threshold."""

    def init(h, c):
        return Score(c[1], jnp.float32(0), jnp.float32(0), jnp.int32(0))

    def decide(state, h, c, i):
        _, x, t = c
        i, t = jnp.asarray(i), t.mean(dtype=jnp.float32)
        moved = jnp.sqrt(jnp.square(x - state.x).mean(dtype=jnp.float32))
        score = state.score + alpha_x * moved + alpha_t * jnp.abs(t - state.t)
        forced = (i < max(round(first * steps), 1)) | (i >= steps - round(last * steps))
        flag = forced | (score > threshold) | (state.run >= max_run)
        return flag, Score(x, t, jnp.where(flag, 0.0, score), jnp.where(flag, 0, state.run + 1))

    return Decision(lambda steps: None, init, decide)


@dataclasses.dataclass(frozen=True)
class SenCacheConfig:
    """SenCache.

    Attributes:
      alpha_x: change of the output, relative, per unit of RMS change of the latents.
      alpha_t: the same per unit of the network's time.
      threshold: largest score of a stretch of skipped steps.
      max_skipped: longest such stretch.
      first: share of the steps that always compute at the start.
      last: at the end.
    """

    alpha_x: float = 1.0
    alpha_t: float = 0.0
    threshold: float = 0.1
    max_skipped: int = 3
    first: float = 0.3
    last: float = 0.1

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        settings = (self.alpha_x, self.alpha_t, self.threshold, self.max_skipped, self.first, self.last)
        decision = sensitivity(pipeline.solver.steps, *settings)
        return pipeline.replace(denoiser=seeing_input(pipeline.denoiser), policy=cached(decision, residual()))
