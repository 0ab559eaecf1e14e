"""How far samples of a shortened run are from those of the full run on the same noise, with intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxcomp.evaluate.intervals import Interval


class Quality(NamedTuple):
    """Per-sample scores against the full run.

    Attributes:
      psnr: 10 log10(range^2 / mean squared difference), dB.
      relative_error: ||x - full||_2 / ||full||_2.
    """

    psnr: Float[np.ndarray, "B"]
    relative_error: Float[np.ndarray, "B"]


def quality(x: Float[np.ndarray, "B ..."], full: Float[np.ndarray, "B ..."], data_range: float = 2.0) -> Quality:
    """Scores of samples whose values span `data_range` (2 for [-1, 1]).

    Raises:
      ValueError: shapes differ, or samples are not finite.
    """
    x, full = np.asarray(x, np.float64), np.asarray(full, np.float64)
    if x.shape != full.shape:
        raise ValueError(f"expected samples of the same shape, found {x.shape} and {full.shape}")
    if not (np.isfinite(x).all() and np.isfinite(full).all()):
        raise ValueError("expected finite samples, found NaN or infinity; the sampler has diverged")
    inner = tuple(range(1, x.ndim))
    mse = np.maximum(np.square(x - full).mean(inner), 1e-20)
    relative = np.sqrt(mse / np.maximum(np.square(full).mean(inner), 1e-20))
    return Quality(10 * np.log10(data_range**2 / mse), relative)


def mean_interval(
    values: Float[np.ndarray, "S B"] | Float[np.ndarray, "B"], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean with a percentile bootstrap interval; of [seeds, samples], each draw takes seeds, and samples within each."""
    values = np.atleast_2d(np.asarray(values, np.float64))
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(values), size=(resamples, len(values), 1))
    columns = rng.integers(values.shape[1], size=(resamples, len(values), values.shape[1]))
    means = values[rows, columns].mean((1, 2))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value = float(values.mean())
    return Interval(value, min(float(low), value), max(float(high), value))
