"""What `experiments.ertacache` compares: every method brought to a number of computed steps, run as data of shared programs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.cache import magcache, teacache
from jaxcomp.sampling.cache.ertacache import ERTACacheConfig, ErtaSettings, calibrate, profile, run_plan
from jaxcomp.sampling.cache.ertacache.plan import greedy, reuse_errors
from jaxcomp.sampling.cache.fora import MODULES
from jaxcomp.sampling.cache.pareto import Batch
from jaxcomp.sampling.cache.search import tune
from jaxcomp.sampling.cache.taylorseer import taylor
from jaxcomp.sampling.cache.uniform import every, spread
from jaxcomp.sampling.denoiser import Denoiser
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.pipeline import Pipeline, with_cache
from jaxcomp.sampling.policy import Store, cached, modules, planned
from jaxcomp.sampling.solvers import anonymous

Run = tuple[np.ndarray, Bool[np.ndarray, "T"]]  # samples, computed steps
STORES: dict[str, Callable[[], Store]] = {"modules": lambda: modules(MODULES), "taylor": lambda: taylor(1)}
MAX_SKIPS = range(1, 9)  # of MagCache


@functools.partial(jax.jit, static_argnames=("denoiser", "store"))
def run_store(denoiser: Denoiser, store: str, params: Any, x: Array, cond: Any, solver, mask) -> Array:
    """Samples with a store of `STORES` and any plan."""
    policy = cached(planned(mask), STORES[store]())
    return sample(denoiser, params, x, cond, solver, policy=policy, executor="cond")[0]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model with its calibration and evaluation noises."""

    config: ConfigDict
    pipeline: Pipeline
    params: Any
    calibration: Batch
    evaluation: Batch

    @property
    def steps(self) -> int:
        """T."""
        return self.pipeline.solver.steps

    @functools.cached_property
    def full(self) -> np.ndarray:
        """Full run on the evaluation noises."""
        return self.plan(np.ones(self.steps, bool))[0]

    @functools.cached_property
    def full_calibration(self) -> np.ndarray:
        """Full run on the calibration noises."""
        return self.plan(np.ones(self.steps, bool), "calibration")[0]

    @functools.cached_property
    def profiles(self) -> dict[str, Any]:
        """Profile of every mode, on the calibration noises."""
        options = dict(window=self.config.window)
        return {m: profile(self.pipeline, self.params, *self.calibration, mode=m, **options) for m in self.config.modes}

    @functools.cached_property
    def curve(self) -> tuple[float, ...]:
        """MagCache's ratios."""
        return magcache.calibrate(self.pipeline, self.params, *self.calibration)

    @functools.cached_property
    def tea(self) -> teacache.TeaCacheConfig:
        """TeaCache with its polynomial."""
        return teacache.calibrated(self.pipeline, self.params, *self.calibration)[0]

    def plan(self, mask: np.ndarray, batch: Literal["calibration", "evaluation"] = "evaluation") -> Run:
        """A plan without adjustment, reusing the trunk's residual."""
        none = np.zeros((self.steps, 1), np.float32)
        args = (self.params, *getattr(self, batch), anonymous(self.pipeline.solver), mask, none, none)
        return np.asarray(run_plan(self.pipeline.denoiser, "trunk", *args)), mask

    def erta(self, config: ERTACacheConfig) -> Run:
        """A calibrated ERTACache."""
        solver, plan = anonymous(with_cache(self.pipeline, config).solver), config.plan
        args = (self.params, *self.evaluation, solver, plan.mask, plan.k, plan.b)
        return np.asarray(run_plan(self.pipeline.denoiser, config.mode, *args)), plan.mask

    def store(self, name: str, mask: np.ndarray) -> Run:
        """A plan with a store of `STORES`."""
        args = (self.params, *self.evaluation, anonymous(self.pipeline.solver), mask)
        return np.asarray(run_store(self.pipeline.denoiser, name, *args)), mask

    def error(self, mask: np.ndarray) -> float:
        """Mean squared end-point error of a plan on the calibration noises."""
        return float(np.square(self.plan(mask, "calibration")[0] - self.full_calibration).mean())


def baselines(bench: Bench, n: int) -> dict[str, Run]:
    """Rivals with n computed steps: {name: (samples, mask)}."""
    even = spread(bench.steps, n)
    interval = bench.steps // n
    runs = {
        "fewer steps": few_steps(bench, n),
        "uniform": bench.plan(even),
        "FORA": bench.store("modules", every(bench.steps, interval)),
        "TaylorSeer, order 1": bench.store("taylor", even),
        "TeaCache": bench.plan(tea_mask(bench, n)),
    }
    mag = mag_mask(bench, n)
    return runs if mag is None else runs | {"MagCache": bench.plan(mag)}


def few_steps(bench: Bench, n: int) -> Run:
    """The same sampler with n steps."""
    solver = solvers.euler_flow(schedules.flow_grid(n, bench.config.shift))
    none = np.zeros((n, 1), np.float32)
    args = (bench.params, *bench.evaluation, anonymous(solver), np.ones(n, bool), none, none)
    return np.asarray(run_plan(bench.pipeline.denoiser, "trunk", *args)), np.ones(n, bool)


def tea_mask(bench: Bench, n: int) -> np.ndarray:
    """TeaCache's steps on the calibration noises, with the threshold that comes nearest to n."""
    return tune(bench.pipeline, bench.tea, bench.params, *bench.calibration, computed=n, tries=24)[1].mask


def mag_mask(bench: Bench, n: int) -> np.ndarray | None:
    """MagCache's plan with n steps: of all longest skips and thresholds the best one on the calibration noises."""
    thresholds = np.geomspace(1e-3, 10, 300)
    plans = {tuple(magcache.plan(bench.curve, t, k, 0.2)) for t in thresholds for k in MAX_SKIPS}
    plans = sorted(plan for plan in plans if sum(plan) == n)
    return min((np.array(plan) for plan in plans), key=bench.error) if plans else None


def variants(bench: Bench, n: int) -> dict[str, Run]:
    """ERTACache with n computed steps, its components and its choices."""
    small = Batch(*(v[: bench.config.small_calibration] for v in bench.calibration))

    def run(measured: bool = True, batch: Batch = bench.calibration, mask=None, **options) -> Run:
        settings = ErtaSettings(**(dict(computed=n, window=bench.config.window) | options))
        known = bench.profiles[settings.mode] if measured else None
        return bench.erta(calibrate(bench.pipeline, settings, bench.params, *batch, measured=known, mask=mask).config)

    plain = dict(phi="off", rectify="off", gate=False)
    runs = {"ERTACache": run(), "erta-dp": run(planner="erta-dp"), "20 calibration samples": run(False, small)}
    runs["TeaCache, rectified"] = run(mask=tea_mask(bench, n))
    for mode in bench.config.modes:
        one = lambda mode=mode, **options: run(**(plain | dict(mode=mode) | options))
        runs |= {
            f"{mode}: uniform": one(mask=spread(bench.steps, n)),
            f"{mode}: plan": one(),
            f"{mode}: plan + time": one(phi="v"),
            f"{mode}: plan + time, paper's Z": one(phi="dv", phi_min=0.01),
            f"{mode}: plan + rectification": one(rectify="channel"),
            f"{mode}: plan + time + rectification": one(phi="v", rectify="channel"),
            f"{mode}: gated": one(phi="v", rectify="channel", gate=True),
        }
    for factor in bench.config.lambda_factors:
        runs[f"lambda x {factor:g}"] = bench.plan(scaled_plan(bench, runs["trunk: plan"][1], factor))
    return runs


def scaled_plan(bench: Bench, mask: np.ndarray, factor: float) -> np.ndarray:
    """The greedy plan at `factor` times the threshold that gives a plan (the largest error that it reuses)."""
    errors = bench.profiles["trunk"].ratio_of_sums
    return greedy(errors, factor * np.nextafter(reuse_errors(errors, mask).max(), np.inf))
