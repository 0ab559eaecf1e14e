"""Reuse at even distances: every N-th step computes, or n of T steps do."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool

from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, cached, output, planned, residual


def every(steps: int, interval: int, warmup: int = 0) -> Bool[np.ndarray, "T"]:
    """True at the steps 0, N, 2 N, ... and before step `warmup`."""
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    index = np.arange(steps)
    return (index % interval == 0) | (index < warmup)


def spread(steps: int, computed: int) -> Bool[np.ndarray, "T"]:
    """True at `computed` of the steps: step 0 and, from two on, the last one among them, the others evenly between.

    Raises:
      ValueError: computed outside of 1..steps.
    """
    if not 1 <= computed <= steps:
        raise ValueError(f"computed must lie in 1..{steps} (the solver's steps), got {computed}")
    mask = np.zeros(steps, bool)
    mask[np.floor(np.linspace(0, steps - 1, computed) + 0.5).astype(int)] = True
    return mask


def uniform(mask: Bool[np.ndarray, "T"], keep: Literal["residual", "output"] = "residual") -> CachePolicy:
    """Reuses the trunk's residual or output at the steps that are False."""
    return cached(planned(mask), {"residual": residual, "output": output}[keep]())


@dataclasses.dataclass(frozen=True)
class UniformCacheConfig:
    """Every `interval`-th step computes, or, where given, `computed` steps in all.

    Attributes:
      interval: distance of computed steps.
      computed: number of computed steps.
      keep: what stands in for a trunk: "residual" (h + R) or "output" (h').
    """

    interval: int = 2
    computed: int | None = None
    keep: Literal["residual", "output"] = "residual"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        steps = pipeline.solver.steps
        mask = every(steps, self.interval) if self.computed is None else spread(steps, self.computed)
        return pipeline.replace(policy=uniform(mask, self.keep))
