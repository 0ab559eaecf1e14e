"""Budgeted calibration: the whole curve of quality over computed steps, and the plan that a budget asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.progress import track
from jaxcomp.evaluate.intervals import Interval
from jaxcomp.sampling.cache.ertacache import ErtaSettings, Profile, calibrate, profile, run_plan
from jaxcomp.sampling.cache.quality import mean_interval, quality
from jaxcomp.sampling.pipeline import CacheConfig, Pipeline, with_cache
from jaxcomp.sampling.solvers import anonymous


class Point(NamedTuple):
    """One plan and what it costs in quality.

    Attributes:
      computed: steps that run the trunk.
      psnr: to the full run on the evaluation noises, dB.
      relative_error: likewise, of the L2 norm.
      config: puts the plan on the pipeline.
    """

    computed: int
    psnr: Interval
    relative_error: Interval
    config: CacheConfig


class Curve(NamedTuple):
    """Plans by rising number of computed steps.

    Attributes:
      steps: of the full run.
      points: see `Point`.
      profile: that the plans were made from, if there is one.
    """

    steps: int
    points: tuple[Point, ...]
    profile: Profile | None = None


class Batch(NamedTuple):
    """Noises and their conditions."""

    x: Float[Array, "B ..."]
    cond: Any = None


def pareto(
    pipeline: Pipeline,
    params: Any,
    calibration: Batch,
    evaluation: Batch,
    *,
    settings: ErtaSettings | None = None,
    computed: Sequence[int] | None = None,
    data_range: float = 2.0,
) -> Curve:
    """ERTACache plans for many numbers of computed steps, calibrated on one batch and scored on another.

    Args:
      pipeline: deterministic, without cache.
      params: of the denoiser.
      calibration: about 20 noises are enough.
      evaluation: other noises; the intervals are over them.
      settings: of the calibrations; their `computed` and `threshold` are ignored.
      computed: numbers of computed steps; by default all that the window allows.
      data_range: of the samples' values, 2 for [-1, 1].

    Raises:
      ValueError: the two batches share a noise, or a number of steps is impossible.
    """
    shared = (np.asarray(calibration.x)[:, None] == np.asarray(evaluation.x)[None]).reshape(len(calibration.x), -1)
    rows = shared.reshape(len(calibration.x), len(evaluation.x), -1).all(-1)
    if rows.any():
        raise ValueError(f"calibration and evaluation share {int(rows.sum())} noises; draw them with different keys")
    settings = settings or ErtaSettings(computed=1)
    steps, mode = pipeline.solver.steps, settings.mode
    measured = profile(pipeline, params, *calibration, mode=mode, window=settings.window)
    fewest = -(-(steps - 1) // (settings.window + 1)) + 1  # one computed step, then at most `window` reused ones
    numbers = sorted(set(range(fewest, steps + 1) if computed is None else computed))
    ones, none = np.ones(steps, bool), np.zeros((steps, 1), np.float32)
    run = lambda solver, *plan: run_plan(pipeline.denoiser, mode, params, *evaluation, anonymous(solver), *plan)
    full, points = run(pipeline.solver, ones, none, none), []
    for n in track(numbers, "calibrating plans"):
        wanted = dataclasses.replace(settings, computed=n, threshold=None)
        config = calibrate(pipeline, wanted, params, *calibration, measured=measured).config
        plan = config.plan
        scores = quality(run(with_cache(pipeline, config).solver, plan.mask, plan.k, plan.b), full, data_range)
        points.append(Point(n, *map(mean_interval, scores), config))
    return Curve(steps, tuple(points), measured)


def measure(
    pipeline: Pipeline,
    configs: Mapping[int, CacheConfig],
    params: Any,
    evaluation: Batch,
    data_range: float = 2.0,
) -> Curve:
    """The curve of any other caches; each is compiled on its own. Points carry the number of steps that were computed."""
    full = jax.jit(lambda *a: pipeline(*a, executor="cond")[0])(params, *evaluation)
    points = []
    for config in track(list(configs.values()), "caches"):
        cached = with_cache(pipeline, config)
        x, trace = jax.jit(lambda *a, cached=cached: cached(*a, executor="cond"))(params, *evaluation)
        points.append(Point(int(trace.nfe), *map(mean_interval, quality(x, full, data_range)), config))
    return Curve(pipeline.solver.steps, tuple(sorted(points, key=lambda point: point.computed)))


def choose(
    curve: Curve, *, psnr: float | None = None, relative_error: float | None = None, computed: int | None = None
) -> Point:
    """The plan for a budget: the fewest steps that surely reach a quality, or the best within a number of steps.

    Args:
      curve: of `pareto` or `measure`.
      psnr: least PSNR to the full run, dB: the interval's lower end must reach it.
      relative_error: largest relative error: the interval's upper end must stay within it.
      computed: most computed steps.

    Raises:
      ValueError: not exactly one budget, or one that no plan meets.
    """
    if sum(budget is not None for budget in (psnr, relative_error, computed)) != 1:
        raise ValueError("expected exactly one budget: psnr, relative_error or computed")
    if computed is not None:
        inside = [point for point in curve.points if point.computed <= computed]
        if not inside:
            raise ValueError(f"no plan computes {computed} steps or fewer; the fewest are {curve.points[0].computed}")
        return max(inside, key=lambda point: point.psnr.value)
    if psnr is not None:
        inside, best = [p for p in curve.points if p.psnr.low >= psnr], max(p.psnr.low for p in curve.points)
        wanted = f"a PSNR of {psnr:g} dB; the best lower bound is {best:.1f} dB"
    else:
        inside = [p for p in curve.points if p.relative_error.high <= relative_error]
        best = min(p.relative_error.high for p in curve.points)
        wanted = f"a relative error of {relative_error:g}; the best upper bound is {best:.3g}"
    if not inside:
        raise ValueError(f"no plan reaches {wanted}; loosen the budget, or calibrate with more computed steps")
    return inside[0]
