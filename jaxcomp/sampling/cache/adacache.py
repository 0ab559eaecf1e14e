"""AdaCache: how much a block's output changed between computed steps decides how far away the next computed step is.

Kahatapitiya et al., ICCV 2025, arXiv 2411.02397.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.sampling.cache.fora import MODULES
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import Decision, cached, modules

FAST_30 = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))  # (distance below, steps to the next)
SLOW_30 = ((0.08, 3), (0.16, 2), (1.0, 1))
STEPS_100 = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))


class Schedule(NamedTuple):
    """Number of the next computed step, the present distance, the block's last output, and the motion seen then."""

    next: Int[Array, ""]
    rate: Int[Array, ""]
    output: Float[Array, "B L D"]
    motion: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Motion:
    """Motion regularisation of videos: m' = (m / scale)^power / divisor and its gradient multiply the distance.

    Attributes:
      frames: on the token axis, in order.
      scale: see above.
      power: see above.
      divisor: see above.
      gradient: weight of the change of m' per step.
    """

    frames: int
    scale: float = 0.385
    power: float = 8.0
    divisor: float = 1.0
    gradient: float = 10.0

    def measure(self, output: Float[Array, "B F*N D"]) -> Float[Array, ""]:
        """m': m is ||r_f - r_{f-1}||_1 / (||r_f||_1 + ||r_{f-1}||_1) over neighbouring frames."""
        frames = output.reshape(output.shape[0], self.frames, -1, output.shape[-1])
        a, b = frames[:, 1:], frames[:, :-1]
        m = jnp.abs(a - b).sum(dtype=jnp.float32) / (jnp.abs(a).sum() + jnp.abs(b).sum()).astype(jnp.float32)
        return (m / self.scale) ** self.power / self.divisor


def adaptive(
    steps: int, module: str, codebook: tuple[tuple[float, int], ...], motion: Motion | None, middle: tuple[int, int]
) -> Decision:
    """Next computed step from d = ||r_prev - r||_1 / ||r_prev||_1 / distance; the first and the last two steps compute."""
    limits = jnp.asarray([limit for limit, _ in codebook], jnp.float32)
    distances = jnp.asarray([n for _, n in codebook] + [1], jnp.int32)
    zero = jnp.int32(0)

    def decide(state, h, c, i):
        i = jnp.asarray(i)
        return (i >= state.next) | (i >= steps - 2), state

    def observe(state, h, c, kept: Mapping[str, Any], i):
        output = kept[module]
        size = jnp.abs(state.output).sum(dtype=jnp.float32)
        rate = jnp.maximum(state.rate, 1).astype(jnp.float32)
        d = jnp.abs(state.output - output).sum(dtype=jnp.float32) / jnp.maximum(size, 1e-30) / rate
        seen = jnp.float32(0) if motion is None else motion.measure(output)
        if motion is not None:
            factor = seen + jnp.abs(motion.gradient * (seen - state.motion) / rate)
            active = (jnp.asarray(i) >= middle[0]) & (jnp.asarray(i) <= middle[1])
            d = d * jnp.where(active, factor, 1.0)
        found = distances[jnp.searchsorted(limits, d, side="right")]
        distance = jnp.where(size > 0, found, 1)  # nothing to compare with at step 0
        return Schedule(jnp.asarray(i, jnp.int32) + distance, distance, output, seen)

    def init(h, c):
        return Schedule(zero, zero, h, jnp.float32(0))

    return Decision(lambda steps: None, init, decide, observe)


@dataclasses.dataclass(frozen=True)
class AdaCacheConfig:
    """AdaCache.

    Attributes:
      module: whose output is compared; it is shaped as h.
      codebook: (limit, steps to the next computed step), limits rising; distances from the last limit on compute the next step.
      pattern: names of the modules to keep; `module` must match.
      motion: regularisation for videos, or None.
      middle: first and last step at which it acts.
    """

    module: str = "blocks_0/attn"
    codebook: tuple[tuple[float, int], ...] = FAST_30
    pattern: str = MODULES
    motion: Motion | None = None
    middle: tuple[int, int] = (4, 26)

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache. Raises ValueError if the limits of the codebook do not rise."""
        if (np.diff([limit for limit, _ in self.codebook]) <= 0).any():
            raise ValueError(f"codebook: expected rising limits, found {self.codebook}")
        decision = adaptive(pipeline.solver.steps, self.module, self.codebook, self.motion, self.middle)
        return pipeline.replace(policy=cached(decision, modules(self.pattern)))
