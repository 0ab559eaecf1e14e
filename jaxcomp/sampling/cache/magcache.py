"""MagCache: the ratio of the residuals' magnitudes from step to step, measured once, says how long a residual may be used.

Ma et al., NeurIPS 2025, arXiv 2506.09045.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.sampling.cache.recorder import record, recorder
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import cached, planned, residual


def calibrate(
    pipeline: Pipeline, params: Any, x: Float[Array, "B ..."], cond: Any = None, key: Any = None
) -> tuple[float, ...]:
    """Mean over tokens of ||R_i||_2 / ||R_{i-1}||_2, R = h' - h, for every step of a full run; 1 for step 0.

    A token is a vector along the last axis of h.
    """
    steps = pipeline.solver.steps

    def observe(memory, h, c, new, i):
        before, curve = memory
        norm = jnp.sqrt(jnp.square(new - h).sum(-1, dtype=jnp.float32))
        return norm, curve.at[i].set((norm / jnp.maximum(before, 1e-12)).mean())

    policy = recorder(lambda h, c: (jnp.zeros(h.shape[:-1]), jnp.zeros(steps)), observe)
    curve = np.array(record(pipeline, policy, params, x, cond, key)[1], np.float64)
    curve[0] = 1.0
    return tuple(map(float, curve))


def interpolate(curve: Sequence[float], steps: int) -> tuple[float, ...]:
    """The curve for another number of steps, by nearest index."""
    index = np.round(np.linspace(0, len(curve) - 1, steps)).astype(int) if steps > 1 else [0]
    return tuple(float(curve[i]) for i in index)


def plan(curve: Sequence[float], threshold: float, max_skips: int, retention: float) -> Bool[np.ndarray, "T"]:
    """Computed steps: rho *= g_i, error += |1 - rho|; skips while error <= threshold and at most `max_skips` in a row.

    Raises:
      ValueError: a curve that is not positive and finite.
    """
    curve = np.asarray(curve, np.float64)
    if not (np.isfinite(curve).all() and (curve > 0).all()):
        raise ValueError("curve: expected positive finite ratios, found others; calibrate again")
    mask, first = np.ones(len(curve), bool), max(1, int(retention * len(curve)))
    rho, error, run = 1.0, 0.0, 0
    for i in range(first, len(curve)):
        rho, run = rho * curve[i], run + 1
        error += abs(1 - rho)
        if error <= threshold and run <= max_skips:
            mask[i] = False
        else:
            rho, error, run = 1.0, 0.0, 0
    return mask


@dataclasses.dataclass(frozen=True)
class MagCacheConfig:
    """MagCache.

    Attributes:
      mag_ratios: curve of `calibrate`; another number of steps takes the nearest entries.
      threshold: of the accumulated error.
      max_skip_steps: longest stretch of skipped steps.
      retention_ratio: share of the steps that always compute at the start.
    """

    mag_ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        curve = interpolate(self.mag_ratios, pipeline.solver.steps)
        mask = plan(curve, self.threshold, self.max_skip_steps, self.retention_ratio)
        return pipeline.replace(policy=cached(planned(mask), residual()))
