"""DeepCache: the deep part of a U-Net is kept; other steps run only the levels above it.

Ma, Fang & Wang, CVPR 2024, arXiv 2312.00858.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool

from jaxcomp.sampling.cache.uniform import every
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, cached, modules, planned


def power_spaced(steps: int, computed: int, center: float, power: float = 1.2) -> Bool[np.ndarray, "T"]:
    """The paper's non-uniform plan: points of linspace((-c)^(1/p), (T - c)^(1/p), n + 1)^p + c, denser around the center c.

    p starts at `power` and shrinks by 0.02 until n distinct steps come out; step 0 is one of them.

    Raises:
      ValueError: computed outside of 1..steps, or no p gives that many steps.
    """
    if not 1 <= computed <= steps:
        raise ValueError(f"computed must lie in 1..{steps} (the solver's steps), got {computed}")
    root = lambda v, p: np.sign(v) * np.abs(v) ** (1 / p)
    raised = lambda v, p: np.sign(v) * np.abs(v) ** p
    for p in np.arange(power, 0.019, -0.02):
        points = raised(np.linspace(root(-center, p), root(steps - center, p), computed + 1), p) + center
        chosen = np.unique(np.append(0, np.clip(np.floor(points[:-1] + 1e-9), 0, steps - 1)).astype(int))
        if len(chosen) == computed:
            return np.isin(np.arange(steps), chosen)
    raise ValueError(f"no power from {power} down gives {computed} distinct steps of {steps} around {center}")


def deepcache(plan: Bool[np.ndarray, "T"], branch: str) -> CachePolicy:
    """Runs all of the U-Net where the plan is True; elsewhere the module `branch` returns what it did last."""
    return cached(planned(plan), modules(branch))


@dataclasses.dataclass(frozen=True)
class DeepCacheConfig:
    """DeepCache.

    Attributes:
      cache_interval: N; ignored where `computed` is given.
      cache_branch: name of the module that holds everything below the skip connection; "inner_1" is all but the first level.
      computed: number of computed steps of the non-uniform plan.
      center: its densest step, as a share of all steps.
    """

    cache_interval: int = 3
    cache_branch: str = r"inner_1"
    computed: int | None = None
    center: float = 0.3

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        steps = pipeline.solver.steps
        if self.computed is None:
            mask = every(steps, self.cache_interval)
        else:
            mask = power_spaced(steps, self.computed, self.center * steps)
        return pipeline.replace(policy=deepcache(mask, self.cache_branch))
