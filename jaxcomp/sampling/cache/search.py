"""Thresholds from a wanted speed-up, and how often a cache hits: for every cache that decides while sampling by a threshold."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.sampling.pipeline import Pipeline, with_cache
from jaxcomp.sampling.solvers import anonymous

Config = TypeVar("Config")


class HitRate(NamedTuple):
    """Which steps of a run used the cache.

    Attributes:
      mask: True where the trunk ran.
    """

    mask: Bool[np.ndarray, "T"]

    @property
    def computed(self) -> int:
        """Steps that ran the trunk."""
        return int(self.mask.sum())

    @property
    def rate(self) -> float:
        """Share of the steps that did not."""
        return 1 - self.computed / len(self.mask)

    @property
    def longest(self) -> int:
        """Longest stretch of skipped steps."""
        return max(map(len, "".join(map(str, self.mask.astype(int))).split("1")))

    def __str__(self) -> str:
        steps = "".join("#" if computed else "." for computed in self.mask)
        return f"{steps}  {self.computed} of {len(self.mask)} steps computed, hit rate {self.rate:.0%}, longest {self.longest}"


def tune(
    pipeline: Pipeline,
    config: Config,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any = None,
    *,
    computed: int,
    field: str = "threshold",
    low: float = 1e-5,
    high: float = 10.0,
    tries: int = 20,
) -> tuple[Config, HitRate]:
    """The config whose threshold computes a number of steps as near as possible to `computed` on a calibration batch.

    Bisects the logarithm of the threshold; compiled once. Check `HitRate.computed`: thresholds can jump over a number.

    Raises:
      ValueError: `computed` outside of 1..steps, or a cache whose plan is known beforehand.
    """
    steps = pipeline.solver.steps
    if not 1 <= computed <= steps:
        raise ValueError(f"computed must lie in 1..{steps} (the solver's steps), got {computed}")
    if with_cache(pipeline, config).policy.plan(steps) is not None:
        raise ValueError(f"{type(config).__name__} has a plan that is known beforehand; there is no threshold to tune")

    @jax.jit
    def mask(threshold: Array, params, x, cond) -> Bool[Array, "T"]:
        new = with_cache(
            pipeline.replace(solver=anonymous(pipeline.solver)), dataclasses.replace(config, **{field: threshold})
        )
        return new(params, x, cond)[1].mask

    best, ends = None, [np.log(low), np.log(high)]
    for _ in range(tries):
        middle = float(np.exp(np.mean(ends)))
        found = HitRate(np.asarray(mask(middle, params, x, cond)))
        if best is None or abs(found.computed - computed) < abs(best[1].computed - computed):
            best = (dataclasses.replace(config, **{field: middle}), found)
        if found.computed == computed:
            break
        ends[0 if found.computed > computed else 1] = np.log(middle)
    return best
