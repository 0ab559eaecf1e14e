"""Which steps compute: the greedy walk of ERTACache over a profile, and the plan of least error by dynamic programming."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def greedy(errors: Float[np.ndarray, "T W"], threshold: float) -> Bool[np.ndarray, "T"]:
    """Reuses step p at k while E[p, k] < threshold, computes otherwise, at the ends, and where k - p passes the window."""
    steps, window = errors.shape
    mask, last = np.ones(steps, bool), 0
    for k in range(1, steps - 1):
        mask[k] = k - last > window or not errors[last, k - last - 1] < threshold
        last = k if mask[k] else last
    return mask


def reuse_errors(errors: Float[np.ndarray, "T W"], mask: Bool[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """E[p(k), k] of every reused step, 0 of computed ones; the window's widest where p(k) is further away."""
    last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), 0))
    distance = np.arange(len(mask)) - last
    row = errors[last, np.clip(distance - 1, 0, errors.shape[1] - 1)]
    return np.where(distance > 0, row, 0.0)


def plan_from_profile(
    errors: Float[np.ndarray, "T W"], threshold: float | None = None, computed: int | None = None
) -> Bool[np.ndarray, "T"]:
    """The greedy plan of a threshold, or the best one with a number of computed steps.

    For a number, every threshold at which the plan can change is tried (the values of E), and of the plans with `computed` steps
    that of the smallest sum of E is taken. If thresholds jump over the number, the plan just below it computes more: where
    that lowers the sum of E the most.

    Raises:
      ValueError: not exactly one of threshold and computed, a negative threshold, or a number that no plan has.
    """
    if (threshold is None) == (computed is None):
        raise ValueError("expected exactly one of threshold and computed")
    if computed is None:
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        return greedy(errors, threshold)
    steps = len(errors)
    fewest = int(greedy(errors, np.inf).sum())
    if not fewest <= computed <= steps:
        raise ValueError(f"computed must lie in {fewest}..{steps} for a window of {errors.shape[1]}, got {computed}")
    values = np.unique(errors[np.isfinite(errors)])
    plans = [greedy(errors, v) for v in (0.0, *np.nextafter(values, np.inf))]
    cost = lambda mask: reuse_errors(errors, mask).sum()
    below = max(int(mask.sum()) for mask in plans if mask.sum() <= computed)
    mask = min((mask for mask in plans if mask.sum() == below), key=cost)
    while mask.sum() < computed:
        options = [mask | (np.arange(steps) == k) for k in np.flatnonzero(~mask)]
        mask = min(options, key=cost)
    return mask


def plan_dp(errors: Float[np.ndarray, "T W"], dt: Float[np.ndarray, "T"], computed: int) -> Bool[np.ndarray, "T"]:
    """The plan with `computed` steps, the ends among them, of least sum_k dt_k E[p(k), k], exactly ("erta-dp", not the paper).

    Raises:
      ValueError: a number of steps that no plan within the window has.
    """
    steps, window = errors.shape
    best = np.full((computed + 1, steps), np.inf)  # [number computed so far, last computed step]
    origin = np.zeros((computed + 1, steps), int)
    best[1, 0] = 0.0
    for n in range(2, computed + 1):
        for q in range(1, steps):
            for p in range(max(0, q - window - 1), q):
                between = np.arange(p + 1, q)
                cost = best[n - 1, p] + (dt[between] * errors[p, between - p - 1]).sum()
                if cost < best[n, q]:
                    best[n, q], origin[n, q] = cost, p
    if not 1 <= computed <= steps or not np.isfinite(best[computed, steps - 1]):
        raise ValueError(
            f"no plan computes {computed} of {steps} steps with reuse over at most {window}; widen the window"
        )
    mask, q = np.zeros(steps, bool), steps - 1
    for n in range(computed, 0, -1):
        mask[q] = True
        q = origin[n, q]
    return mask
