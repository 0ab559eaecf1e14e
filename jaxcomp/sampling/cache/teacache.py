"""TeaCache: a polynomial of the change of the first block's input says how much the output has changed since it was computed.

Liu et al., CVPR 2025, arXiv 2411.19108.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.cache.recorder import record, recorder, relative_l1
from jaxcomp.sampling.denoiser import exposing
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import Decision, cached, residual

Metric = Callable[[Any, Any], Array]  # metric(h, c): what is compared between neighbouring steps
PUBLISHED = {  # highest degree first; of the authors' code, for these models only
    "FLUX": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "Wan-1.3B, 5 first steps kept": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "Wan-1.3B": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "Wan-14B, 5 first steps kept": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "HunyuanVideo": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "CogVideoX": (-1538.80483, 842.202495, -134.363087, 7.97131516, -0.0523162339),
}


class Accumulator(NamedTuple):
    """Metric of the step before, and the change foreseen since the last computed step."""

    metric: Any
    total: Float[Array, ""]


def teacache(
    threshold: Any,
    coefficients: Sequence[float],
    steps: int,
    retained: int = 1,
    metric: Metric = lambda h, c: h,
    clamp: bool = False,
) -> Decision:
    """acc += poly(rel-L1 of the metric to the step before); computes, and sets acc to 0, unless acc < threshold.

    The first `retained` steps and the last one compute. `clamp`: no negative values of the polynomial (the authors' code has
    them).
    """

    def decide(state, h, c, i):
        now = metric(h, c)
        change = jnp.polyval(jnp.asarray(coefficients, jnp.float32), relative_l1(now, state.metric))
        total = state.total + (jnp.maximum(change, 0.0) if clamp else change)
        i = jnp.asarray(i)
        flag = (total >= threshold) | (i < max(retained, 1)) | (i == steps - 1)
        return flag, Accumulator(now, jnp.where(flag, 0.0, total))

    return Decision(lambda steps: None, lambda h, c: Accumulator(metric(h, c), jnp.float32(0)), decide)


class Fit(NamedTuple):
    """A polynomial from the metric's change to the output's.

    Attributes:
      coefficients: highest degree first.
      r_squared: share of the variance of the output's change that it explains.
      metric: rel-L1 changes of the metric, all pairs of neighbouring steps of all runs.
      output: of the trunk's output.
    """

    coefficients: tuple[float, ...]
    r_squared: float
    metric: Float[np.ndarray, "N"]
    output: Float[np.ndarray, "N"]


def changes(
    pipeline: Pipeline, metric: Metric, params: Any, x: Float[Array, "B ..."], cond: Any = None, key: Any = None
) -> tuple[Float[np.ndarray, "T-1"], Float[np.ndarray, "T-1"]]:
    """rel-L1 of the metric and of the trunk's output to the step before, in a full run."""
    steps = pipeline.solver.steps

    def observe(memory, h, c, new, i):
        metrics, output, table = memory
        row = jnp.stack([relative_l1(metric(h, c), metrics), relative_l1(new, output)])
        return metric(h, c), new, table.at[i].set(row)

    policy = recorder(lambda h, c: (metric(h, c), h, jnp.zeros((steps, 2))), observe)
    table = np.asarray(record(pipeline, policy, params, x, cond, key)[2], np.float64)
    return table[1:, 0], table[1:, 1]


def fit_polynomial(metric: Float[np.ndarray, "N"], output: Float[np.ndarray, "N"], degree: int = 4) -> Fit:
    """Least squares of the output's change on the metric's.

    Raises:
      ValueError: fewer pairs than coefficients, or values that are not finite.
    """
    metric, output = np.asarray(metric, np.float64), np.asarray(output, np.float64)
    if len(metric) <= degree or not (np.isfinite(metric).all() and np.isfinite(output).all()):
        raise ValueError(f"expected more than {degree} finite pairs, found {len(metric)}; record more or longer runs")
    coefficients = np.polynomial.Polynomial.fit(metric, output, degree).convert().coef
    coefficients = np.append(coefficients, np.zeros(degree + 1 - len(coefficients)))[::-1]
    rest = output - np.polyval(coefficients, metric)
    r_squared = 1 - float(np.square(rest).sum() / max(np.square(output - output.mean()).sum(), 1e-30))
    return Fit(tuple(map(float, coefficients)), r_squared, metric, output)


@dataclasses.dataclass(frozen=True)
class TeaCacheConfig:
    """TeaCache.

    Attributes:
      threshold: of the accumulated change; `search.tune` finds the one for a number of computed steps.
      coefficients: of the polynomial, highest degree first; fit them for each model (`calibrated`).
      module: its input is the metric.
      retained: first steps that always compute.
      clamp: no negative values of the polynomial.
    """

    threshold: Any
    coefficients: tuple[float, ...]
    module: str = "blocks_0/attn"
    retained: int = 1
    clamp: bool = False

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        settings = (self.threshold, self.coefficients, pipeline.solver.steps, self.retained)
        decision = teacache(*settings, metric=lambda h, c: c[1], clamp=self.clamp)
        denoiser = exposing(pipeline.denoiser, self.module)
        return pipeline.replace(denoiser=denoiser, policy=cached(decision, residual()))


def calibrated(
    pipeline: Pipeline,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any = None,
    *,
    threshold: float = 0.1,
    module: str = "blocks_0/attn",
    degree: int = 4,
) -> tuple[TeaCacheConfig, Fit]:
    """A config whose polynomial is fitted to full runs of the pipeline."""
    exposed = pipeline.replace(denoiser=exposing(pipeline.denoiser, module))
    fit = fit_polynomial(*changes(exposed, lambda h, c: c[1], params, x, cond), degree)
    return TeaCacheConfig(threshold, fit.coefficients, module), fit
