"""A threshold per head for a wanted error: heads differ far more in what they need than layers or prompts do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.attention.method import SparseAttention, dense_attention


class Calibrated(NamedTuple):
    """Per head.

    Attributes:
      threshold: for the method's constructor.
      error: relative squared error of the output on the calibration sequences, mean (o' - o)^2 / mean o^2.
      density: of the method there.
    """

    threshold: Float[np.ndarray, "H"]
    error: Float[np.ndarray, "H"]
    density: Float[np.ndarray, "H"]


class Tried(NamedTuple):
    """What every threshold costs and gives, on the calibration sequences.

    Attributes:
      threshold: tried ones.
      error: relative squared error per threshold and head.
      density: likewise.
    """

    threshold: Float[np.ndarray, "T"]
    error: Float[np.ndarray, "T H"]
    density: Float[np.ndarray, "T H"]

    def within(self, target: float) -> Calibrated:
        """The sparsest threshold whose error is at most `target`, per head; the most exact one where none is.

        Raises:
          ValueError: the target is not positive.
        """
        if not target > 0:
            raise ValueError(f"calibration needs a positive target, found {target}")
        usable = self.error <= target
        best = np.where(usable.any(0), np.where(usable, self.density, np.inf).argmin(0), self.error.argmin(0))
        pick = lambda table: np.take_along_axis(table, best[None], axis=0)[0]
        return Calibrated(self.threshold[best], pick(self.error), pick(self.density))


def try_thresholds(
    method_of: Callable[[float], SparseAttention],
    thresholds: Sequence[float],
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N K d"],
    value: Float[Array, "B N K d"],
) -> Tried:
    """Runs every threshold once; `within` then serves any number of targets. Arguments and errors as of `calibrate`."""
    if not len(thresholds):
        raise ValueError("calibration needs thresholds to try, found none")
    tried = np.asarray(thresholds, np.float32)
    run = jax.jit(lambda threshold: _errors(method_of(threshold), query, key, value))
    return Tried(tried, *(np.stack(part) for part in zip(*(jax.device_get(run(t)) for t in tried), strict=True)))


def calibrate(
    method_of: Callable[[float], SparseAttention],
    thresholds: Sequence[float],
    query: Float[Array, "B N H d"],
    key: Float[Array, "B N K d"],
    value: Float[Array, "B N K d"],
    target: float,
) -> Calibrated:
    """The sparsest of `thresholds` whose error is at most `target`, per head; the most exact one where none is.

    Args:
      method_of: threshold -> method, say `lambda t: s2o(threshold=t, segment=64)`; thresholds are traced.
      thresholds: to try, in any order.
      query: of calibration sequences, after the positional embedding.
      key: likewise.
      value: likewise.
      target: relative squared error.

    Raises:
      ValueError: no threshold, or a target that is not positive.
    """
    return try_thresholds(method_of, thresholds, query, key, value).within(target)


def _errors(method: SparseAttention, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """(relative squared error, density) per head."""
    mask = jnp.tril(jnp.ones((query.shape[1],) * 2, bool)) if method.causal else None
    exact = dense_attention(query, key, value, mask).astype(jnp.float32)
    out, stats = method.attend(query, key, value)
    squared = lambda x: (x.astype(jnp.float32) ** 2).mean((0, 1, 3))
    return squared(out.astype(jnp.float32) - exact) / squared(exact), stats.density.mean(0)
