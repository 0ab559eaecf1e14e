"""Explicit error rectification: the error of a reused output is an affine function of that output, fitted beforehand.

The paper's predictor sigmoid(K v + B) with sigmoid(z) ~ z / 4 + 1 / 2 is ordinary least squares: (K v + B) / 4 + 1 / 2 = k v + b.
That is what is fitted and what is used; the sigmoid itself, with these coefficients, would add a constant error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.denoiser import Denoiser, call
from jaxcomp.sampling.policy import Store
from jaxcomp.sampling.solvers import LinearSolver, advance, coefficients


def ols(v: Float[Array, "N C"], error: Float[Array, "N C"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """k = cov(v, e) / (var(v) + 1e-8), b = mean e - k mean v, per column; k = 0 where var(v) < 1e-6 mean(v)^2."""
    v, error = v.astype(jnp.float32), error.astype(jnp.float32)
    mean, shift = v.mean(0, keepdims=True), error.mean(0, keepdims=True)
    variance = jnp.square(v - mean).mean(0)
    slope = ((v - mean) * (error - shift)).mean(0) / (variance + 1e-8)
    k = jnp.where(variance < 1e-6 * jnp.square(mean[0]), 0.0, slope)
    return k, shift[0] - k * mean[0]


def paper_coefficients(k: Array, b: Array) -> tuple[Array, Array]:
    """(K, B) with (K v + B) / 4 + 1 / 2 = k v + b."""
    return 4 * k, 4 * (b - 0.5)


def rectifier(k: Float[Array, "T C"], b: Float[Array, "T C"]) -> Corrector:
    """o - (k_i o + b_i); zero rows leave an output as it is. C is the last axis of the latents, or 1.

    Raises:
      ValueError: coefficients of another number of channels (when sampled).
    """

    def init(x):
        if k.shape[-1] not in (1, x.shape[-1]):
            raise ValueError(
                f"rectification: expected {x.shape[-1]} channels, found {k.shape[-1]}; calibrate this model"
            )
        return ()

    def on_output(state, out, x, i):
        row = lambda v: jnp.asarray(v)[i].astype(out.dtype).reshape((1,) * (out.ndim - 1) + (-1,))
        return out - (row(k) * out + row(b)), state

    return Corrector(init=init, on_output=on_output)


class Followed(NamedTuple):
    """What was seen along a cached run on which the network was evaluated at every step.

    Attributes:
      x: samples of the cached run.
      k: least squares of the reuse error on the reused output, 0 at computed steps.
      b: see `k`.
      error: mean over samples of ||o~ - o||_1 / ||o||_1.
      error_to_change: the same over ||o - o of the step before||_1.
    """

    x: Float[Array, "B ..."]
    k: Float[Array, "T C"]
    b: Float[Array, "T C"]
    error: Float[Array, "T"]
    error_to_change: Float[Array, "T"]


def follow(
    denoiser: Denoiser,
    store: Store,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    solver: LinearSolver,
    mask: Bool[Array, "T"],
    *,
    per_channel: bool = True,
    rectified: bool = True,
) -> Followed:
    """Runs a plan and fits every reused step on the states that it reaches; pure, one scan.

    Args:
      denoiser: cut where `store` caches.
      store: what is kept of computed steps.
      params: of the denoiser.
      x: noises of the calibration set.
      cond: their conditions.
      solver: deterministic.
      mask: True at computed steps.
      per_channel: one (k, b) per channel of the last axis, or one for all.
      rectified: the trajectory is rectified step by step as it is fitted (sequential refit), or not at all.
    """
    run = lambda h, c, around=call: denoiser.trunk(params, h, c, around)
    channels = x.shape[-1] if per_channel else 1

    def evaluate(kept, x, i):
        row = coefficients(solver, i, x.dtype)
        h, c = denoiser.embed(params, row.in_scale * x, jnp.broadcast_to(row.t, x.shape[:1]), cond)
        finish = lambda h: row.skip * x + row.gain * denoiser.head(params, h, c).astype(x.dtype)
        true, fresh = store.compute(kept, run, h, c, i)
        return finish(true), finish(store.reuse(kept, run, h, c, i)[0]), fresh

    def step(carry, at):
        x, outputs, kept, before = carry
        i, flag = at
        true, reused, fresh = evaluate(kept, x, i)
        k, b = ols(reused.reshape(-1, channels), (reused - true).reshape(-1, channels))
        k, b = jnp.where(flag, 0.0, k), jnp.where(flag, 0.0, b)
        wide = lambda v: v.reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
        better = reused - (wide(k) * reused + wide(b)) if rectified else reused
        pick = lambda a, b: jnp.where(flag, a, b)
        outputs = (pick(true, better), *outputs)
        norm = lambda v: jnp.abs(v).sum(tuple(range(1, v.ndim))) + 1e-6
        wrong = norm(reused - true)
        seen = (k, b, (wrong / norm(true)).mean(), (wrong / norm(true - before)).mean())
        kept = jax.tree.map(pick, fresh, kept)
        return (advance(coefficients(solver, i, x.dtype), x, outputs), outputs[:-1], kept, true), seen

    embedded = lambda: denoiser.embed(params, x, jnp.broadcast_to(jnp.asarray(solver.t)[0], x.shape[:1]), cond)
    shapes = jax.eval_shape(lambda: store.init(run, *embedded()))
    kept = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    start = (x, (jnp.zeros_like(x),) * (solver.b.shape[1] - 1), kept, jnp.zeros_like(x))
    (end, *_), seen = jax.lax.scan(step, start, (jnp.arange(solver.steps), jnp.asarray(mask).at[0].set(True)))
    return Followed(end, *seen)
