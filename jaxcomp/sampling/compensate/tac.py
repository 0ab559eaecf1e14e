"""TAC-Diffusion: rescales large outputs of a quantized denoiser per channel and step, and shifts the state to the right mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.sampling.compensate.tcec import relative_fit
from jaxcomp.sampling.compensate.trajectory import Model, Step, Trajectory, closed_loop, trajectory
from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.solvers import LinearSolver


class Tac(NamedTuple):
    """Elements above `threshold` times the mean |o~| of their sample become k o~; then the next state moves by `shift`.

    Attributes:
      k: factor per channel.
      shift: mean of full-precision minus quantized state after the step, per channel.
      threshold: the same at all steps.
    """

    k: Float[Array, "T C"]
    shift: Float[Array, "T C"]
    threshold: Float[Array, "T"]


def tac(coefficients: Tac) -> Corrector:
    """The corrector (Yao et al., ECCV 2024, arXiv 2407.03917): noise reconstruction and input bias correction."""

    def on_output(state, out, x, i):
        del x
        return rescale(out, coefficients.k[i], coefficients.threshold[i]).astype(out.dtype), state

    def on_state(state, x, out, i):
        del out
        return (x + wide(coefficients.shift[i], x)).astype(x.dtype), state

    return Corrector(on_output=on_output, on_state=on_state)


def wide(v: Float[Array, "C"], x: Float[Array, "N ... C"]) -> Array:
    """v with the rank of x."""
    return v.reshape(*[1] * (x.ndim - 1), -1)


def large(out: Float[Array, "N ... C"], threshold: float | Array) -> Array:
    """bool: elements above `threshold` times the mean magnitude of their sample; one-sided, as in the published code."""
    return out > threshold * jnp.abs(out).mean(tuple(range(1, out.ndim)), keepdims=True)


def rescale(out: Float[Array, "N ... C"], k: Float[Array, "C"], threshold: float | Array) -> Array:
    """k out where out is large, out elsewhere."""
    return jnp.where(large(out, threshold), wide(k, out) * out, out)


def calibrate(
    reference: Model,
    quantized: Model,
    solver: LinearSolver,
    x: Float[Array, "N ... C"],
    cond: Any,
    *,
    relative: float = 0.5,
    prior: float = 0.1,
    threshold: float = 1.0,
) -> Tac:
    """Coefficients step by step on the already corrected trajectory ("recurrent" calibration).

    Args:
      reference: full precision.
      quantized: what will be sampled.
      solver: deterministic.
      x: noises.
      cond: of all noises.
      relative: weight lambda_1 of the relative error.
      prior: weight lambda_2 towards k = 1.
      threshold: see `Tac`.

    Raises:
      ValueError: as `trajectory` says.
    """
    full = trajectory(reference, solver, x, cond)
    return _fit(quantized, solver, full, cond, relative, prior, threshold)


@jax.jit
@compressed
def _fit(quantized: Model, solver: LinearSolver, full: Trajectory, cond: Any, relative, prior, threshold) -> Tac:
    inner, size = tuple(range(full.states.ndim - 2)), full.states[0, 0].size

    def on_output(before, out, exact):
        del before
        mask = large(out, threshold)
        mean = lambda v: jnp.where(mask, v, 0.0).mean(inner)
        k = relative_fit(out, exact, mean, relative, prior, size)
        return rescale(out, k, threshold), k

    def on_state(k, step: Step):
        shift = (step.target - step.free).mean(inner)
        return step.free + wide(shift, step.free), k, Tac(k, shift, jnp.asarray(threshold, jnp.float32))

    zeros = jnp.zeros((solver.steps, full.states.shape[-1]))
    blank = Tac(zeros, zeros, jnp.zeros(solver.steps))
    return closed_loop(quantized, solver, full, cond, blank, on_state=on_state, on_output=on_output, memory=zeros[0])
