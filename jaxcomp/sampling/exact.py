"""Denoisers that are exact: of Gaussian mixtures, for tests and for caches without a trained model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.schedules import Grid
from jaxcomp.sampling.solvers import Prediction

Levels = Callable[[Array], tuple[Array, Array]]  # t -> (alpha, sigma)


def levels_of(grid: Grid) -> Levels:
    """(alpha, sigma) of what the network is told, by linear interpolation between the steps of a (fine) grid."""
    order = np.argsort(grid.t)
    t, alpha, sigma = (jnp.asarray(v[: grid.steps][order], jnp.float32) for v in grid)
    return lambda at: (jnp.interp(at, t, alpha), jnp.interp(at, t, sigma))


def flow_levels_of(time_scale: float = 1000.0) -> Levels:
    """(1 - s, s) with s = t / time_scale."""
    return lambda t: (1 - t / time_scale, t / time_scale)


def mixture(
    means: Float[np.ndarray, "K ..."], stds: Float[np.ndarray, "K"], levels: Levels, prediction: Prediction = "eps"
) -> Callable[..., Array]:
    """`fn(params, x, t, cond) -> prediction` for data that is an even mixture of isotropic Gaussians.

    E[x0 | x] is the sum over components of their posterior weight times mu + a s^2 / (a^2 s^2 + sigma^2) (x - a mu).

    Args:
      means: of the components, shaped as one latent.
      stds: s of the components.
      levels: (alpha, sigma) of t.
      prediction: what is returned.
    """
    means, stds = jnp.asarray(means, jnp.float32), jnp.asarray(stds, jnp.float32)
    inner = tuple(range(1, means.ndim))

    def one(x: Array, alpha: Array, sigma: Array) -> Array:
        var = (alpha * stds) ** 2 + sigma**2  # [K], of x given the component
        var = var.reshape(var.shape + (1,) * len(inner))
        off = x[None] - alpha * means
        log_weight = -0.5 * (off**2 / var + jnp.log(var)).sum(inner)
        s2 = (stds**2).reshape(var.shape)
        x0 = jnp.tensordot(jax.nn.softmax(log_weight), means + alpha * s2 / var * off, 1)
        eps = jnp.tensordot(jax.nn.softmax(log_weight), sigma / var * off, 1)
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    def fn(params, x, t, cond):
        del params, cond
        return jax.vmap(one)(x, *levels(t))

    return fn
