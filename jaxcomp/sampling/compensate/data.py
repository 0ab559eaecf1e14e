"""Calibration inputs of denoisers: what a model meets on its own generated trajectories."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.calibrate import Calibration
from jaxcomp.sampling.compensate.trajectory import Model, trajectory
from jaxcomp.sampling.denoiser import call
from jaxcomp.sampling.solvers import LinearSolver

Draw = Literal["uniform", "normal"]


class Inputs(NamedTuple):
    """A batch of inputs of a denoiser."""

    x: Float[Array, "B ..."]
    t: Float[Array, "B"]
    cond: Any


def steps_to_keep(draw: Draw, steps: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Index of a sampling step for each of `samples` inputs, int [samples].

    "uniform": equally many of every step (Q-Diffusion, arXiv 2302.04304). "normal": drawn around 0.4 of the schedule, standard
    deviation 0.4 of it, clamped, time counted from the clean end (PTQ4DM, arXiv 2211.15736).

    Raises:
      ValueError: another draw.
    """
    if draw == "uniform":
        return rng.permutation(np.arange(samples) % steps)
    if draw == "normal":
        share = np.clip(rng.normal(0.4, 0.4, samples), 0, 1)
        return np.round((1 - share) * (steps - 1)).astype(int)
    raise ValueError(f"draw: expected 'uniform' or 'normal', found {draw!r}")


def calibration(
    model: Model,
    solver: LinearSolver,
    x: Float[Array, "N ..."],
    cond: Any,
    *,
    draw: Draw = "uniform",
    per_noise: int = 4,
    batches: int = 4,
    seed: int = 0,
) -> Calibration:
    """Statistics for quantizers from `per_noise` states of the trajectory that each noise leads to.

    Args:
      model: full precision; its unguided denoiser, so that inputs are those of one branch.
      solver: that will be used.
      x: noises.
      cond: of all noises, a pytree with a leading axis N, or None.
      draw: see `steps_to_keep`.
      per_noise: states kept of each trajectory.
      batches: that the inputs are cut into; must divide their number.
      seed: of the draw.

    Raises:
      ValueError: as `trajectory` and `steps_to_keep` say, or inputs that cannot be cut evenly.
    """
    total = len(x) * per_noise
    if total % batches:
        raise ValueError(f"{total} inputs cannot be cut into {batches} batches; choose a divisor")
    rng = np.random.default_rng(seed)
    kept, noise = steps_to_keep(draw, solver.steps, total, rng), rng.permutation(np.arange(total) % len(x))
    states = trajectory(model, solver, x, cond, jax.random.key(seed)).states
    scale = jnp.asarray(solver.in_scale)[kept].reshape(-1, *[1] * (x.ndim - 1))
    inputs = Inputs(scale * states[kept, noise], jnp.asarray(solver.t)[kept], jax.tree.map(lambda v: v[noise], cond))
    parts = [jax.tree.map(lambda v, i=i: v[i::batches], inputs) for i in range(batches)]
    return Calibration(_apply(model.denoiser), parts)


def _apply(denoiser):
    def apply(params, batch: Inputs):
        h, c = denoiser.embed(params, *batch)
        return denoiser.head(params, denoiser.trunk(params, h, c, call), c)

    return apply
