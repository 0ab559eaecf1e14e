"""How the error of each step travels to the later ones: exactly to first order, or with the network's Jacobian dropped."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.solvers import LinearSolver, coefficients


def phi(a: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T+1 T+1"]:
    """Phi(n, k) = a_k a_{k+1} ... a_{n-1}: the factor from the error of state k to that of state n >= k, 0 for n < k; float64."""
    size = len(a) + 1
    table = np.zeros((size, size))
    for k in range(size):
        table[k:, k] = np.cumprod(np.concatenate([[1.0], np.asarray(a, np.float64)[k:]]))
    return table


def propagate(
    solver: LinearSolver,
    errors: Float[Array, "T B ..."],
    jvp: Callable[[Array, Array], Array] | None = None,
) -> Float[Array, "T+1 B ..."]:
    """delta_{i+1} = a_i delta_i + sum_j b_ij (e_{i-j} + J_{i-j} delta_{i-j}), delta_0 = 0 (TCEC, arXiv 2508.12094).

    Args:
      solver: its outputs o = f(x).
      errors: e_i, by which the output of step i is wrong at the input that it got.
      jvp: `jvp(i, delta) -> J_i delta`, J_i = df/dx on the full-precision trajectory; None drops it (approximation 1).
    """

    def step(carry, at):
        i, error = at
        delta, outputs = carry
        outputs = jnp.concatenate([(error if jvp is None else error + jvp(i, delta))[None], outputs[:-1]])
        k = coefficients(solver, i, delta.dtype)
        delta = k.a * delta + jnp.tensordot(k.b, outputs, 1)
        return (delta, outputs), delta

    start = jnp.zeros_like(errors[0])
    history = jnp.zeros((solver.b.shape[1], *start.shape), start.dtype)
    _, deltas = jax.lax.scan(step, (start, history), (jnp.arange(solver.steps), errors))
    return jnp.concatenate([start[None], deltas])


def window_weights(solver: LinearSolver, k: Float[Array, "T C"], m: int) -> Float[np.ndarray, "T W C"]:
    """Weights w of the correction x_{i+1} - sum_l w_il o_{i-l} for local errors e_i = k_i o_i over m earlier steps; W = m + p.

    w_il = sum_{r+j=l, r<=m} Phi(i+1, i-r+1) b_{i-r,j} k_{i-l}: for one-step solvers and m = 1 that is (b_i k_i, a_i b_{i-1}
    k_{i-1}). Float64 sums, float32 result.
    """
    a, b = np.asarray(solver.a, np.float64), np.asarray(solver.b, np.float64)
    steps, order = b.shape
    table, k = phi(a), np.asarray(k, np.float64)
    weights = np.zeros((steps, m + order, k.shape[1]))
    for i in range(steps):
        for r in range(min(m, i) + 1):
            for j in range(min(order, i - r + 1)):
                weights[i, r + j] += table[i + 1, i - r + 1] * b[i - r, j] * k[i - r - j]
    return weights.astype(np.float32)
