"""A sampler as one value, and caches put on it: `with_cache(pipeline, MagCacheConfig(...))` returns another pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.denoiser import Denoiser
from jaxcomp.sampling.loop import Executor, Trace, sample
from jaxcomp.sampling.policy import CachePolicy, frozen
from jaxcomp.sampling.solvers import LinearSolver


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything that a run needs but its arrays: `pipeline(params, x, cond, key)`.

    Attributes:
      denoiser: the network.
      solver: of `jaxcomp.sampling.solvers`.
      policy: of the cache, None for none.
      corrector: of outputs and states, None for none.
      executor: None picks "static" for plans known beforehand and "cond" for decisions while sampling.
    """

    denoiser: Denoiser
    solver: LinearSolver
    policy: CachePolicy | None = None
    corrector: Corrector | None = None
    executor: Executor | None = None

    def __call__(
        self, params: Any, x: Float[Array, "B ..."], cond: Any = None, key: Array | None = None, **options: Any
    ) -> tuple[Float[Array, "B ..."], Trace]:
        """`sample` with these parts; `options` go there, too."""
        dynamic = self.policy is not None and self.policy.plan(self.solver.steps) is None
        options = {"executor": self.executor or ("cond" if dynamic else "static"), "key": key} | options
        return sample(
            self.denoiser, params, x, cond, self.solver, policy=self.policy, corrector=self.corrector, **options
        )

    def replace(self, **changes: Any) -> Pipeline:
        """The pipeline with other parts."""
        return dataclasses.replace(self, **changes)


class CacheConfig(Protocol):
    """Settings of a cache: a frozen dataclass, one per method."""

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        ...


def with_cache(pipeline: Pipeline, config: CacheConfig) -> Pipeline:
    """The pipeline with a cache. Its state lives inside each run; the old pipeline stays as it is.

    Raises:
      ValueError: the pipeline has a cache already.
    """
    if pipeline.policy is not None:
        raise ValueError("the pipeline has a cache already; put the new one on the pipeline without it")
    return config.apply(pipeline)


def freeze_plan(
    pipeline: Pipeline, params: Any, x: Float[Array, "B ..."], cond: Any = None, key: Array | None = None
) -> Pipeline:
    """Records which steps a cache computes on a calibration batch, and fixes them: the result is a static plan.

    Raises:
      ValueError: the pipeline has no cache.
    """
    if pipeline.policy is None:
        raise ValueError("the pipeline has no cache whose decisions could be recorded; use with_cache first")
    mask = np.asarray(pipeline(params, x, cond, key)[1].mask)
    return pipeline.replace(policy=frozen(pipeline.policy, mask), executor="static")
