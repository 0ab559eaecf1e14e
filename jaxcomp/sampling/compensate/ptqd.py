"""PTQD: undoes the part of the quantization error that is correlated with the output, its bias, and, with noise, its variance."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.compensate.trajectory import Model, shared_outputs, trajectory
from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.solvers import LinearSolver


class Ptqd(NamedTuple):
    """e = o~ - o = k o + bias + r per step; the output becomes (o~ - bias) / (1 + k).

    Attributes:
      k: slope on the full-precision output, at least 0.
      bias: mean of what the slope leaves, per channel.
      residual: standard deviation of r.
    """

    k: Float[Array, "T"]
    bias: Float[Array, "T C"]
    residual: Float[Array, "T"]


def ptqd(coefficients: Ptqd) -> Corrector:
    """The corrector (He et al., NeurIPS 2023, arXiv 2305.10657, equations 9 to 13)."""

    def on_output(state, out, x, i):
        del x
        bias = coefficients.bias[i].reshape(*[1] * (out.ndim - 1), -1)
        return ((out - bias) / (1 + coefficients.k[i])).astype(out.dtype), state

    return Corrector(on_output=on_output)


def calibrate(reference: Model, quantized: Model, solver: LinearSolver, x: Float[Array, "N ... C"], cond: Any) -> Ptqd:
    """Coefficients on inputs that both models share, along the full-precision trajectory.

    Raises:
      ValueError: as `trajectory` says.
    """
    full = trajectory(reference, solver, x, cond)
    return fit(shared_outputs(quantized, solver, full.states, cond), full.outputs)


def fit(rounded: Float[Array, "T N ... C"], full: Float[Array, "T N ... C"]) -> Ptqd:
    """Least squares per step: one slope for all channels, clamped at 0, and a bias per channel."""
    wide = lambda v: v.reshape(-1, *[1] * (full.ndim - 1))
    everything, inner = tuple(range(1, full.ndim)), tuple(range(1, full.ndim - 1))
    error = rounded - full
    centred = full - wide(full.mean(everything))
    k = jnp.maximum((centred * error).mean(everything) / (centred**2).mean(everything), 0.0)
    rest = error - wide(k) * full
    bias = rest.mean(inner)
    residual = rest - bias.reshape(len(k), *[1] * (full.ndim - 2), -1)
    return Ptqd(k, bias, residual.std(everything))


def absorb(solver: LinearSolver, coefficients: Ptqd) -> LinearSolver:
    """A stochastic solver that draws less noise where the residual error already is noise: equation 15, for one-step solvers.

    noise'^2 = max(noise^2 - (b residual / (1 + k))^2, 0).

    Raises:
      ValueError: a deterministic solver, or one of several outputs.
    """
    if not solver.stochastic or solver.b.shape[1] != 1:
        raise ValueError(
            f"{solver.name}: only a stochastic one-step solver has noise to give; use ddpm or ddim(eta > 0)"
        )
    added = np.asarray(solver.b)[:, 0] * np.asarray(coefficients.residual) / (1 + np.asarray(coefficients.k))
    noise = np.sqrt(np.maximum(np.asarray(solver.noise) ** 2 - added**2, 0)).astype(np.float32)
    return dataclasses.replace(solver, noise=noise, name=f"{solver.name}+ptqd", digest=f"{solver.digest}+ptqd")
