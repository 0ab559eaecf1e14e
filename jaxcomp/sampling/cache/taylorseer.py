"""TaylorSeer: module outputs are forecast from their finite differences over the computed steps.

Liu et al., ICCV 2025, arXiv 2503.06923.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcomp.sampling.cache.fora import MODULES
from jaxcomp.sampling.cache.uniform import every
from jaxcomp.sampling.denoiser import module_outputs
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Store, cached, planned

Form = Literal["taylor", "newton"]


class Forecast(NamedTuple):
    """Differences of one or many outputs.

    Attributes:
      factors: f_0 .. f_m, each a tree of outputs.
      at: the last m + 1 computed steps, newest first.
      count: number of computed steps.
    """

    factors: tuple[Any, ...]
    at: Int[Array, "m+1"]
    count: Int[Array, ""]


def update(forecast: Forecast, value: Any, i: Any, form: Form) -> Forecast:
    """Differences after a computed step: f_0 = F, f_{j+1} = (f_j - old f_j) / distance; 0 until enough steps are known.

    The distance is that to the last computed step ("taylor", the paper's), or to the one j + 1 computed steps ago ("newton",
    divided differences).
    """
    new = [value]
    for j, old in enumerate(forecast.factors[:-1]):
        gap = i - forecast.at[0 if form == "taylor" else j]
        scale = jnp.where(forecast.count > j, 1 / jnp.maximum(gap, 1).astype(jnp.float32), 0.0)
        new.append(jax.tree.map(lambda a, b: scale.astype(a.dtype) * (a - b), new[-1], old))  # noqa: B023 (called at once)
    at = jnp.concatenate([jnp.asarray(i, jnp.int32)[None], forecast.at[:-1]])
    return Forecast(tuple(new), at, forecast.count + 1)


def predict(forecast: Forecast, i: Any, form: Form) -> Any:
    """sum_j f_j d^j / j! with d the distance to the last computed step, or Newton's sum_j f_j prod_{l<j} (i - at_l)."""
    total, weight = forecast.factors[0], jnp.float32(1)
    for j, factor in enumerate(forecast.factors[1:], 1):
        if form == "taylor":
            weight = (i - forecast.at[0]).astype(jnp.float32) ** j / math.factorial(j)
        else:
            weight = weight * (i - forecast.at[j - 1]).astype(jnp.float32)
        total = jax.tree.map(lambda a, f: a + weight.astype(a.dtype) * f, total, factor)  # noqa: B023 (called at once)
    return total


def taylor(order: int, pattern: str | None = MODULES, form: Form = "taylor") -> Store:
    """Keeps differences up to `order` of the outputs of modules, or of the whole trunk (`pattern` None).

    "taylor" is exact on outputs that are linear in the step (order 1); "newton" on polynomials of degree `order` once
    order + 1 steps are computed.

    Raises:
      ValueError: order < 0, an unknown form, or no module matches (when sampled).
    """
    if order < 0 or form not in ("taylor", "newton"):
        raise ValueError(f"expected order >= 0 and form 'taylor' or 'newton', got {order} and {form!r}")

    def record(run, h, c):
        if pattern is None:
            new = run(h, c)
            return new, new
        return module_outputs(lambda around: run(h, c, around), pattern)

    def init(run, h, c):
        _, value = record(run, h, c)
        return Forecast((value,) * (order + 1), jnp.zeros(order + 1, jnp.int32), jnp.int32(0))

    def compute(kept, run, h, c, i):
        new, value = record(run, h, c)
        return new, update(kept, value, i, form)

    def reuse(kept, run, h, c, i):
        value = predict(kept, i, form)
        if pattern is None:
            return value, kept
        return run(h, c, lambda name, fn, h: value[name] if name in value else fn(h)), kept

    return Store(init, compute, reuse)


def taylorseer(interval: int, order: int = 1, warmup: int = 3, **options: Any) -> CachePolicy:
    """Computes at the steps 0, N, 2 N, ... and before step `warmup`; `options` as in `taylor`."""
    return cached(planned(lambda steps: every(steps, interval, warmup)), taylor(order, **options))


@dataclasses.dataclass(frozen=True)
class TaylorSeerCacheConfig:
    """TaylorSeer.

    Attributes:
      cache_interval: N.
      disable_cache_before_step: steps that always compute.
      max_order: of the differences.
      pattern: names of the forecast modules; None forecasts what the trunk returns (the "lite" form).
      form: "taylor" (the paper's) or "newton" (exact on polynomials).
    """

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    max_order: int = 1
    pattern: str | None = MODULES
    form: Form = "taylor"

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        options = dict(pattern=self.pattern, form=self.form)
        policy = taylorseer(self.cache_interval, self.max_order, self.disable_cache_before_step, **options)
        return pipeline.replace(policy=policy)
