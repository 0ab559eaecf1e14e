"""Error against density of one attention operation on structured heads, for `experiments.s2o`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from jaxcomp.attention import SparseAttention, Statistics, dense_attention
from jaxcomp.attention.heads import synthetic_head

Method = tuple[Callable[[Any], SparseAttention], Sequence[float]]  # (threshold -> method, thresholds to try)


class Point(NamedTuple):
    """One run: what was computed, what was read, and the mean squared error of the output."""

    threshold: float
    density: float
    value_density: float
    error: float


def arrays(head: Iterable[np.ndarray]) -> tuple[Array, ...]:
    """One head as [N, 1, d] arrays."""
    return tuple(jnp.asarray(x)[:, None] for x in head)


@jax.jit
def exact(q: Float[Array, "N 1 d"], k: Float[Array, "N 1 d"], v: Float[Array, "N 1 d"]) -> Float[Array, "N 1 d"]:
    """Dense causal attention."""
    return dense_attention(q, k, v, jnp.tril(jnp.ones((len(q), len(q)), bool)))


@functools.cache
def runner(method_of: Callable[[Any], SparseAttention]) -> Callable[..., tuple[Array, Statistics]]:
    """Compiled `(threshold, q, k, v) -> (output, statistics)`."""
    return jax.jit(lambda threshold, q, k, v: method_of(threshold).attend(q, k, v))


def curve(method: Method, q: Array, k: Array, v: Array, truth: Array) -> list[Point]:
    """One point per threshold."""
    method_of, thresholds = method
    points = []
    for threshold in thresholds:
        out, stats = runner(method_of)(threshold, q, k, v)
        shares = float(stats.density[0]), float(stats.value_density[0])
        points.append(Point(float(threshold), *shares, float(((out - truth) ** 2).mean())))
    return points


def sweep(methods: Mapping[str, Method], kind: str, length: int, seed: int) -> dict[str, list[Point]]:
    """Curves of all methods on one head."""
    head = arrays(synthetic_head(kind, length, seed))
    truth = exact(*head)
    return {name: curve(method, *head, truth) for name, method in methods.items()}


def error_at(points: Sequence[Sequence[float]], density: float) -> float | None:
    """Error at a density of values, straight lines between the logarithms; None outside of what was run."""
    ordered = sorted((p[2], p[3]) for p in points)
    return _interpolate(density, *zip(*ordered, strict=True))


def density_at(points: Sequence[Sequence[float]], error: float) -> float | None:
    """Density at which the error falls to a level; None outside of what was run."""
    ordered = sorted((p[3], p[2]) for p in points)
    return _interpolate(error, *zip(*ordered, strict=True))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    floor = 1e-12
    if not xs[0] <= x <= xs[-1]:
        return None
    return float(np.exp(np.interp(math.log(x), np.log(np.maximum(xs, floor)), np.log(np.maximum(ys, floor)))))


def geometric(values: Sequence[float | None]) -> float | None:
    """Geometric mean; None where a value is missing."""
    return None if not values or None in values else float(np.exp(np.mean(np.log(values))))


def interval(values: Sequence[float | None], level: float = 0.95) -> list[float] | None:
    """[geometric mean, low, high]: Student's interval of the logarithms over seeds; None where a seed is missing."""
    mean = geometric(values)
    if mean is None or len(values) < 2:
        return None if mean is None else [mean] * 3
    logs = np.log(values)
    reach = scipy.stats.t.ppf((1 + level) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return [mean, mean * math.exp(-reach), mean * math.exp(reach)]
