"""ERTACache from a calibration set: plan, then time steps, then rectification, each fitted on what the ones before lead to.

Peng et al., "ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion", ICLR 2026, arXiv 2508.21091.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.sampling.cache.ertacache.plan import plan_dp, plan_from_profile
from jaxcomp.sampling.cache.ertacache.profile import Mode, Profile, cut, profile, store
from jaxcomp.sampling.cache.ertacache.rectify import Followed, follow, rectifier
from jaxcomp.sampling.cache.ertacache.timesteps import adjust, flow_steps, with_steps
from jaxcomp.sampling.compensate.key import Key, key_of, load_calibration, save_calibration
from jaxcomp.sampling.corrector import chain
from jaxcomp.sampling.denoiser import Denoiser
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import cached, planned
from jaxcomp.sampling.solvers import LinearSolver, anonymous


class ErtaPlan(NamedTuple):
    """Everything that a run with ERTACache needs to know.

    Attributes:
      mask: True at computed steps.
      dt: steps of the adjusted flow grid; all 0 keeps the solver's own.
      k: slope of the reuse error per step and channel, 0 at computed steps.
      b: its constant.
    """

    mask: Bool[np.ndarray, "T"]
    dt: Float[np.ndarray, "T"]
    k: Float[np.ndarray, "T C"]
    b: Float[np.ndarray, "T C"]


@dataclasses.dataclass(frozen=True)
class ErtaSettings:
    """How to calibrate.

    Attributes:
      computed: number of computed steps; or give `threshold`.
      threshold: lambda, relative error up to which a step is reused.
      mode: what is kept: "trunk" (residual of the trunk), "out" (output), "out_res" (output plus input, the paper's letter).
      planner: "erta" (the paper's greedy walk) or "erta-dp" (least sum of dt E; needs `computed`).
      average: of the profile over samples.
      phi: norm under the reuse error: "v" (||v||), "dv" (||v - v of the step before||), or "off": no adjustment of time steps.
      phi_min: smallest factor of a reused time step.
      rectify: one (k, b) per "channel", one "scalar" for all, or "off".
      sequential: fit each step on the trajectory that is rectified before it; else all on the one that is not.
      window: longest reuse.
      gate: keep time adjustment and rectification only where they lower the end-point error on the calibration set.
    """

    computed: int | None = None
    threshold: float | None = None
    mode: Mode = "trunk"
    planner: Literal["erta", "erta-dp"] = "erta"
    average: Literal["ratio_of_sums", "mean_of_ratios"] = "ratio_of_sums"
    phi: Literal["v", "dv", "off"] = "v"
    phi_min: float = 0.8
    rectify: Literal["channel", "scalar", "off"] = "channel"
    sequential: bool = True
    window: int = 8
    gate: bool = True

    def __post_init__(self):
        for name, allowed in (
            ("planner", ("erta", "erta-dp")),
            ("average", Profile._fields),
            ("phi", ("v", "dv", "off")),
            ("rectify", ("channel", "scalar", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if not 0 < self.phi_min <= 1:
            raise ValueError(f"phi_min must lie in (0, 1], got {self.phi_min}")
        if self.planner == "erta-dp" and self.computed is None:
            raise ValueError("planner 'erta-dp' needs the number of computed steps; give computed")


@dataclasses.dataclass(frozen=True)
class ERTACacheConfig:
    """A calibrated ERTACache.

    Attributes:
      plan: of `calibrate`.
      mode: what is kept; that of the calibration.
      solver: digest of the solver that was calibrated; "" accepts any with as many steps.
    """

    plan: ErtaPlan
    mode: Mode = "trunk"
    solver: str = ""

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache; its rectification comes after correctors that the pipeline has.

        Raises:
          ValueError: the plan was made for another solver or number of steps.
        """
        solver, steps = pipeline.solver, len(self.plan.mask)
        if steps != solver.steps or (self.solver and self.solver != solver.digest):
            made, found = (
                f"{steps} steps, digest {self.solver or 'any'}",
                f"{solver.steps} steps, digest {solver.digest}",
            )
            raise ValueError(
                f"ERTACache plan: made for a solver of {made}, found {solver.name} of {found}; calibrate again"
            )
        if np.any(self.plan.dt):
            solver = with_steps(solver, self.plan.dt)
        fix = rectifier(self.plan.k, self.plan.b)
        return pipeline.replace(
            denoiser=cut(pipeline.denoiser, self.mode),
            solver=solver,
            policy=cached(planned(np.asarray(self.plan.mask)), store(self.mode)),
            corrector=fix if pipeline.corrector is None else chain(pipeline.corrector, fix),
        )


class Calibrated(NamedTuple):
    """Result of a calibration.

    Attributes:
      config: to put on the pipeline.
      profile: E, where it was measured.
      phi: factors of the time steps before the gate, 1 where there are none.
      errors: {variant: mean squared end-point error to the full run on the calibration set}; the kept one is the least if gated.
    """

    config: ERTACacheConfig
    profile: Profile | None
    phi: Float[np.ndarray, "T"]
    errors: dict[str, float]


def calibrate(
    pipeline: Pipeline,
    settings: ErtaSettings,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any = None,
    *,
    measured: Profile | None = None,
    mask: Bool[np.ndarray, "T"] | None = None,
) -> Calibrated:
    """Plan, time steps and rectification for a pipeline without cache.

    Args:
      pipeline: deterministic.
      settings: see there.
      params: of the denoiser.
      x: noises of the calibration set; about 20 are enough.
      cond: their conditions.
      measured: a profile from before, so that many plans cost one measurement.
      mask: a plan of another method (TeaCache, MagCache), to be rectified.

    Raises:
      ValueError: a stochastic solver, time adjustment of another solver than euler_flow, or as `plan_from_profile` says.
    """
    if pipeline.solver.stochastic or pipeline.policy is not None or pipeline.corrector is not None:
        raise ValueError("calibrate a deterministic pipeline without cache or corrector")
    steps = flow_steps(pipeline.solver) if settings.phi != "off" else np.ones(pipeline.solver.steps)
    if mask is None:
        if measured is None:
            measured = profile(pipeline, params, x, cond, mode=settings.mode, window=settings.window)
        mask = make_plan(settings, getattr(measured, settings.average), _weights(pipeline.solver))
    runs = _Runs(pipeline, settings, params, x, cond, np.asarray(mask, bool))
    phi = _phi(settings, runs)
    dts = [np.zeros(len(mask))] + [adjust(steps, mask, phi)] * (settings.phi != "off")
    plans = {}
    for name, dt in zip(("plan", "time"), dts, strict=False):
        channels = x.shape[-1] if settings.rectify == "channel" else 1
        zeros = np.zeros((len(mask), channels), np.float32)
        plans[name] = ErtaPlan(runs.mask, dt.astype(np.float32), zeros, zeros)
        if settings.rectify != "off":
            seen = runs.follow(dt, settings.sequential)
            plans[f"{name} + rectification"] = plans[name]._replace(k=np.asarray(seen.k), b=np.asarray(seen.b))
    errors = {name: runs.error(plan) for name, plan in plans.items()}
    chosen = min(errors, key=errors.__getitem__) if settings.gate else list(plans)[-1]
    return Calibrated(ERTACacheConfig(plans[chosen], settings.mode, pipeline.solver.digest), measured, phi, errors)


def make_plan(
    settings: ErtaSettings, errors: Float[np.ndarray, "T W"], weights: Float[np.ndarray, "T"]
) -> Bool[np.ndarray, "T"]:
    """The mask that the settings ask for; `weights` are those of a step's output in the solver, for "erta-dp"."""
    if settings.planner == "erta-dp":
        return plan_dp(errors, weights, settings.computed)
    return plan_from_profile(errors, settings.threshold, settings.computed)


def _weights(solver: LinearSolver) -> Float[np.ndarray, "T"]:
    return np.abs(np.asarray(solver.b, np.float64)).sum(1)


def _phi(settings: ErtaSettings, runs: _Runs) -> Float[np.ndarray, "T"]:
    if settings.phi == "off":
        return np.ones(len(runs.mask))
    seen = runs.follow(np.zeros(len(runs.mask)), None)
    ratio = np.asarray(seen.error if settings.phi == "v" else seen.error_to_change, np.float64)
    return np.where(runs.mask, 1.0, np.clip(1 - ratio, settings.phi_min, 1.0))


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs on the calibration set that share their compiled programs."""

    pipeline: Pipeline
    settings: ErtaSettings
    params: Any
    x: Array
    cond: Any
    mask: Bool[np.ndarray, "T"]

    def solver(self, dt: np.ndarray) -> LinearSolver:
        """The adjusted solver."""
        return anonymous(with_steps(self.pipeline.solver, dt) if np.any(dt) else self.pipeline.solver)

    def follow(self, dt: np.ndarray, sequential: bool | None) -> Followed:
        """`follow` on this grid."""
        per_channel = self.settings.rectify == "channel"
        args = (self.params, self.x, self.cond, self.solver(dt), self.mask)
        return _follow(self.pipeline.denoiser, self.settings.mode, *args, per_channel, bool(sequential))

    @functools.cached_property
    def full(self) -> Array:
        """Samples of the full run."""
        ones, none = np.ones(len(self.mask), bool), np.zeros((len(self.mask), 1), np.float32)
        return run_plan(
            self.pipeline.denoiser,
            self.settings.mode,
            self.params,
            self.x,
            self.cond,
            self.solver(np.zeros(1)),
            ones,
            none,
            none,
        )

    def error(self, plan: ErtaPlan) -> float:
        """Mean squared end-point error of a plan."""
        args = (self.params, self.x, self.cond, self.solver(plan.dt), plan.mask, plan.k, plan.b)
        return float(jnp.square(run_plan(self.pipeline.denoiser, self.settings.mode, *args) - self.full).mean())


@functools.partial(jax.jit, static_argnames=("denoiser", "mode", "per_channel", "rectified"))
def _follow(
    denoiser: Denoiser, mode: Mode, params, x, cond, solver, mask, per_channel: bool, rectified: bool
) -> Followed:
    parts = (cut(denoiser, mode), store(mode))
    return follow(*parts, params, x, cond, solver, mask, per_channel=per_channel, rectified=rectified)


@functools.partial(jax.jit, static_argnames=("denoiser", "mode"))
def run_plan(
    denoiser: Denoiser, mode: Mode, params: Any, x: Float[Array, "B ..."], cond: Any, solver: LinearSolver, mask, k, b
) -> Float[Array, "B ..."]:
    """Samples of a plan, all of it as arguments: one program for every plan. `solver` is `anonymous`."""
    policy = cached(planned(mask), store(mode))
    options = dict(policy=policy, corrector=rectifier(k, b), executor="cond")
    return sample(cut(denoiser, mode), params, x, cond, solver, **options)[0]


def save(path, config: ERTACacheConfig, params: Any, solver: LinearSolver, guidance: float = 1.0) -> None:
    """Writes the plan to a safetensors file under the key of model, solver, steps and guidance, atomically."""
    save_calibration(path, config.plan, _key(params, solver, guidance, config.mode))


def load(path, params: Any, solver: LinearSolver, guidance: float = 1.0, mode: Mode = "trunk") -> ERTACacheConfig:
    """The config that `save` wrote.

    Raises:
      CheckpointError: the file is damaged, or the plan was made for another model, solver, step count, guidance or mode.
    """
    plan = load_calibration(path, ErtaPlan, _key(params, solver, guidance, mode))
    return ERTACacheConfig(ErtaPlan(*map(np.asarray, plan)), mode, solver.digest)


def _key(params: Any, solver: LinearSolver, guidance: float, mode: Mode) -> Key:
    return key_of(params, params, solver, guidance)._replace(plan=f"ertacache {mode}")
