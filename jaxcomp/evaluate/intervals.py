"""Percentile bootstrap intervals over windows (Efron & Tibshirani, 1993, chapter 13), and the interval of a median."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxcomp.evaluate.perplexity import Perplexity


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_perplexity(result: Perplexity, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Interval of the perplexity over draws of windows with replacement."""
    samples = _mean_nll(result, _draws(len(result.nll), resamples, seed))
    return Interval(result.ppl, *_ends(np.exp(samples), level))


def paired_ratio(
    new: Perplexity, base: Perplexity, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of ppl(new) / ppl(base) on the same windows: every draw takes the same windows for both.

    Raises:
      ValueError: the two were not scored on windows of one number and length.
    """
    draws = _paired_draws(new, base, resamples, seed)
    samples = np.exp(_mean_nll(new, draws) - _mean_nll(base, draws))
    return Interval(new.ppl / base.ppl, *_ends(samples, level))


def paired_difference(
    new: Perplexity, base: Perplexity, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of ppl(new) - ppl(base), paired as in `paired_ratio`; 0 outside of it means the two differ.

    Raises:
      ValueError: the two were not scored on windows of one number and length.
    """
    draws = _paired_draws(new, base, resamples, seed)
    samples = np.exp(_mean_nll(new, draws)) - np.exp(_mean_nll(base, draws))
    return Interval(new.ppl - base.ppl, *_ends(samples, level))


def median_by_order(values: Float[np.ndarray, "n"]) -> Interval:
    """Median of repeated measurements with its 95 % interval by order statistics, that of a binomial(n, 1/2)."""
    ordered, n = np.sort(values), len(values)
    reach = round(0.98 * n**0.5)  # 1.96 standard deviations
    low, high = max((n - 1) // 2 - reach, 0), min(n // 2 + reach, n - 1)
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))


def _draws(windows: int, resamples: int, seed: int) -> Int[np.ndarray, "resamples windows"]:
    return np.random.default_rng(seed).integers(windows, size=(resamples, windows))


def _paired_draws(new: Perplexity, base: Perplexity, resamples: int, seed: int) -> Int[np.ndarray, "r w"]:
    shapes = [(len(result.nll), result.tokens_per_window) for result in (new, base)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a paired bootstrap needs equal windows; found (windows, tokens) {shapes[0]} and {shapes[1]}")
    return _draws(len(new.nll), resamples, seed)


def _mean_nll(result: Perplexity, draws: Int[np.ndarray, "r w"]) -> Float[np.ndarray, "r"]:
    return result.nll[draws].mean(axis=1) / result.tokens_per_window


def _ends(samples: Float[np.ndarray, "r"], level: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
