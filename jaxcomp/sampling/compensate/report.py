"""What quantization does to a sampling run: errors per step, how they add up, and how well propagation predicts it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.sampling.compensate.propagation import propagate
from jaxcomp.sampling.compensate.trajectory import Model, shared_outputs, trajectory
from jaxcomp.sampling.denoiser import call
from jaxcomp.sampling.solvers import LinearSolver, coefficients


class ErrorReport(NamedTuple):
    """Errors of a quantized run, all root mean squares over samples and elements.

    Attributes:
      local: |e_i| / |o_i| with e_i = f_q(x~_i) - f(x~_i).
      correlation: of the quantized output with e_i.
      cumulative: |x~_i - x_i|, the initial 0 included.
      without_jacobian: |predicted - true| / |true| of the state after each step, true e_i propagated with J = 0.
      first_order: the same with the Jacobian on the full-precision trajectory.
    """

    local: Float[np.ndarray, "T"]
    correlation: Float[np.ndarray, "T"]
    cumulative: Float[np.ndarray, "T+1"]
    without_jacobian: Float[np.ndarray, "T"]
    first_order: Float[np.ndarray, "T"]


def error_report(
    reference: Model, quantized: Model, solver: LinearSolver, x: Float[Array, "N ..."], cond: Any
) -> ErrorReport:
    """Runs both models from the same noises. Without cache: errors of skipped steps are not those of quantization.

    Raises:
      ValueError: as `trajectory` says.
    """
    full, rounded = trajectory(reference, solver, x, cond), trajectory(quantized, solver, x, cond)
    errors = rounded.outputs - shared_outputs(reference, solver, rounded.states, cond)
    true = rounded.states - full.states
    predicted = (propagate(solver, errors), _first_order(reference, solver, full.states, errors, cond))
    inner = tuple(range(1, errors.ndim))
    rms = lambda v: jnp.sqrt(jnp.mean(v**2, inner))
    centred = lambda v: v - v.mean(inner, keepdims=True)
    covariance = jnp.mean(centred(rounded.outputs) * centred(errors), inner)
    spread = rms(centred(rounded.outputs)) * rms(centred(errors))
    relative = [rms(p - true)[1:] / jnp.maximum(rms(true)[1:], 1e-30) for p in predicted]
    found = (rms(errors) / rms(full.outputs), covariance / jnp.maximum(spread, 1e-30), rms(true), *relative)
    return ErrorReport(*map(np.asarray, found))


@jax.jit
@compressed
def _first_order(model: Model, solver: LinearSolver, states: Array, errors: Array, cond: Any) -> Array:
    denoiser, params = model.denoiser, model.params

    def jvp(i, delta):
        k = coefficients(solver, i, delta.dtype)

        def output(x):
            h, c = denoiser.embed(params, k.in_scale * x, jnp.broadcast_to(k.t, x.shape[:1]), cond)
            return k.skip * x + k.gain * denoiser.head(params, denoiser.trunk(params, h, c, call), c)

        return jax.jvp(output, (states[i],), (delta,))[1]

    return propagate(solver, errors, jvp)
