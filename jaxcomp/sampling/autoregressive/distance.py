"""How far a chunk has moved between two of its steps: what chunk-wise caches accumulate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.autoregressive.denoiser import ChunkDenoiser
from jaxcomp.sampling.autoregressive.policy import Step
from jaxcomp.sampling.solvers import LinearSolver


class Distance(NamedTuple):
    """A measure of the change since the chunk's last step, computed or not; one number for the whole batch.

    Attributes:
      init: `init(h) -> state`.
      measure: `measure(state, step, h) -> (f32[], state)`; of no meaning at step 0.
    """

    init: Callable[[Array], Any]
    measure: Callable[[Any, Step, Array], tuple[Array, Any]]


def tabled(table: Float[np.ndarray | Array, "n"]) -> Distance:
    """Distances that depend on the step alone; with them all chunk-wise decisions are known beforehand.

    Raises:
      ValueError: the table is not a vector of finite numbers.
    """
    if jnp.ndim(table) != 1 or not (isinstance(table, jax.core.Tracer) or np.isfinite(np.asarray(table)).all()):
        raise ValueError(
            f"distances: expected one finite number per step, found shape {jnp.shape(table)}; measure again"
        )
    return Distance(lambda h: (), lambda state, step, h: (jnp.asarray(table, jnp.float32)[step.index], state))


def embedded() -> Distance:
    """mean|h_i - h_{i-1}| / mean|h_{i-1}| of the trunk's input (MAGI-1)."""

    def measure(state, step, h):
        del step
        return relative_change(h, state), h

    return Distance(jnp.zeros_like, measure)


def relative_change(new: Float[Array, "..."], old: Float[Array, "..."]) -> Float[Array, ""]:
    """mean|new - old| / mean|old|, in float32."""
    new, old = new.astype(jnp.float32), old.astype(jnp.float32)
    return jnp.mean(jnp.abs(new - old)) / (jnp.mean(jnp.abs(old)) + 1e-8)


def time_table(
    denoiser: ChunkDenoiser,
    params: Any,
    x: Float[Array, "B L C"],
    cond: Any,
    solver: LinearSolver,
    select: Callable[[Any], Array] = lambda c: c.modulation,
    polynomial: Sequence[float] | None = None,
) -> Float[np.ndarray, "n"]:
    """Relative change of the time modulation from step to step, through a polynomial if given (SkyReels-V2).

    Args:
      denoiser: the network.
      params: its parameters.
      x: any latents of a chunk; they do not matter.
      cond: any condition.
      solver: its times are those of the steps.
      select: takes the modulation from the denoiser's c.
      polynomial: coefficients of the rescaling, highest power first.
    """
    embed = lambda t: select(denoiser.embed(params, x[:1], t[None], jax.tree.map(lambda v: v[:1], cond))[1])
    modulation = jax.jit(lambda times: jax.lax.map(embed, times))(jnp.asarray(solver.t))
    change = jax.vmap(relative_change)(modulation[1:], modulation[:-1])
    change = np.append(0.0, np.asarray(change, np.float64))
    return change if polynomial is None else np.append(0.0, np.polyval(polynomial, change[1:]))


def output_table(latents: Float[np.ndarray, "n+1 ..."], levels: Float[np.ndarray, "n+1"]) -> Float[np.ndarray, "n"]:
    """Relative change of the velocity from step to step, from the latents of an uncached run of Euler steps."""
    latents, levels = np.asarray(latents, np.float64), np.asarray(levels, np.float64)
    velocity = np.diff(latents, axis=0) / np.diff(levels).reshape(-1, *[1] * (latents.ndim - 1))
    change = np.abs(np.diff(velocity, axis=0)).reshape(len(velocity) - 1, -1).mean(1)
    return np.append(0.0, change / np.abs(velocity[:-1]).reshape(len(velocity) - 1, -1).mean(1))
