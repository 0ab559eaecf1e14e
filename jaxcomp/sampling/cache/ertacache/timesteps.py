"""Trajectory-aware timestep adjustment: shorter steps where reuse is poor; the whole adjusted grid is known beforehand."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from jaxcomp.sampling.schedules import flow_levels
from jaxcomp.sampling.solvers import LinearSolver, euler_flow


def adjust(
    base: Float[np.ndarray, "T"], mask: Bool[np.ndarray, "T"], phi: Float[np.ndarray, "T"]
) -> Float[np.ndarray, "T"]:
    """dt_k = d_k rem_k / sum_{j>=k} d_j, times phi_k at reused steps; the last step takes what remains (rem is remaining time).

    Args:
      base: d, steps of the base grid; their sum is kept.
      mask: True at computed steps.
      phi: in (0, 1].

    Raises:
      ValueError: phi outside of (0, 1] at a reused step.
    """
    base, phi = np.asarray(base, np.float64), np.where(mask, 1.0, phi)
    if not ((phi > 0) & (phi <= 1)).all():
        raise ValueError(f"phi: expected factors in (0, 1], found {phi.min():.3g} to {phi.max():.3g}; set phi_min")
    dt, remaining = np.zeros_like(base), base.sum()
    for k in range(len(base) - 1):
        dt[k] = base[k] * remaining / base[k:].sum() * phi[k]
        remaining -= dt[k]
    dt[-1] = remaining
    return dt


def flow_steps(solver: LinearSolver) -> Float[np.ndarray, "T"]:
    """d_k > 0, the steps in noise level of an Euler flow solver.

    Raises:
      ValueError: another solver; only the flow's time can be adjusted.
    """
    if solver.name != "euler_flow" or np.any(np.asarray(solver.skip) != 0):
        raise ValueError(
            f"timestep adjustment is defined for euler_flow with prediction 'flow', found {solver.name}; use phi='off'"
        )
    return -np.asarray(solver.b, np.float64)[:, 0]


def with_steps(solver: LinearSolver, dt: Float[np.ndarray, "T"]) -> LinearSolver:
    """The Euler flow solver with other steps; the network is told the new levels on the same scale."""
    first = flow_steps(solver).sum()
    levels = np.append(np.cumsum(np.asarray(dt, np.float64)[::-1])[::-1], 0.0)
    scale = float(np.asarray(solver.t)[0]) / first
    levels = np.minimum(levels * (first / levels[0]), 1.0)  # float32 sums may pass 1 in the last digit
    return euler_flow(flow_levels(levels, scale))
