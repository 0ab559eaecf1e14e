"""How much of a correction to apply, by its effect on noises that it was not fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.sampling.compensate import tcec
from jaxcomp.sampling.compensate.tcec import DEFAULT, Tcec, TcecConfig
from jaxcomp.sampling.compensate.trajectory import Model, trajectory
from jaxcomp.sampling.corrector import chain
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.solvers import LinearSolver


class Selected(NamedTuple):
    """The chosen correction.

    Attributes:
      coefficients: fitted to all noises with the chosen gain.
      config: with that gain; mode "off" where no gain was worth it.
      decibels: {gain: held-out reduction of the end-point error in dB}.
    """

    coefficients: Tcec
    config: TcecConfig
    decibels: dict[float, float]


def select_gain(
    reference: Model,
    quantized: Model,
    solver: LinearSolver,
    x: Float[Array, "N ... C"],
    cond: Any,
    config: TcecConfig = DEFAULT,
    *,
    gains: Sequence[float] = (0.5, 0.75, 1.0),
    held_out: float = 0.25,
    least: float = 0.1,
) -> Selected:
    """Fits on a part of the noises, takes the gain that serves the rest best, and fits again on all of them.

    Args:
      reference: full precision.
      quantized: what will be sampled.
      solver: deterministic.
      x: noises.
      cond: of all noises.
      config: its gain is replaced.
      gains: to choose from.
      held_out: share of the noises that the fit does not see.
      least: reduction in dB below which the correction is switched off.

    Raises:
      ValueError: too few noises to hold some out, or as `tcec.calibrate` says.
    """
    count = round(held_out * len(x))
    if not 0 < count < len(x):
        raise ValueError(f"{len(x)} noises cannot be split at a held-out share of {held_out}; give more of them")
    part = lambda rows: (x[rows], jax.tree.map(lambda v: v[rows], cond))
    fitted, rest = part(slice(count, None)), part(slice(None, count))
    exact = trajectory(reference, solver, *rest).states[-1]
    before = _error(quantized, solver, *rest, None, exact)
    decibels = {}
    for gain in gains:
        found = tcec.calibrate(reference, quantized, solver, *fitted, dataclasses.replace(config, gain=gain))
        decibels[gain] = float(10 * np.log10(before / _error(quantized, solver, *rest, found, exact)))
    best = max(gains, key=decibels.__getitem__)
    chosen = dataclasses.replace(config, gain=best, mode=config.mode if decibels[best] >= least else "off")
    return Selected(tcec.calibrate(reference, quantized, solver, x, cond, chosen), chosen, decibels)


def _error(model: Model, solver: LinearSolver, x, cond, coefficients: Tcec | None, exact) -> float:
    return max(float(jnp.square(_end(model, solver, x, cond, coefficients) - exact).mean()), 1e-20)


@jax.jit
@compressed
def _end(model: Model, solver: LinearSolver, x: Array, cond: Any, coefficients: Tcec | None) -> Array:
    corrector = model.corrector if coefficients is None else chain(model.corrector, tcec.tcec(coefficients))
    options = dict(policy=model.policy, corrector=corrector, executor="cond")
    return sample(model.denoiser, model.params, x, cond, solver, **options)[0]
