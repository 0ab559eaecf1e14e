"""TCEC: subtracts an estimate of the error that a quantized denoiser has added to the state, from its newest outputs.

S. Liu et al., "Error Propagation Mechanisms and Compensation Strategies for Quantized Diffusion", arXiv 2508.12094. The
paper's forms estimate the local error by e_i = K_i o_i and propagate it by the solver's coefficients; `ls2`, the default, fits
the same correction directly to the deviation of the running, already corrected trajectory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.sampling.compensate.propagation import window_weights
from jaxcomp.sampling.compensate.trajectory import (
    Model,
    Step,
    Trajectory,
    closed_loop,
    empty,
    shared_outputs,
    trajectory,
)
from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.solvers import LinearSolver

Per = Literal["channel", "position", "scalar"]


@dataclasses.dataclass(frozen=True)
class TcecConfig:
    """How errors are estimated and removed.

    Attributes:
      mode: "ls2": two outputs and a constant; "inplace": this step's error; "window1": also that of the step before, as the
        paper's equation 18 reads; "window1_alt": the two of them at every second step, so that none is removed twice; "off".
      fit: "closed_loop": least squares on the corrected trajectory; on shared inputs: "paper": regression of e on the quantized
        output, "ptqd": on the full-precision one, inverted, "tac": with a relative term.
      relative: weight lambda_1 of the relative term of "tac".
      prior: weight lambda_2 of "tac" towards no correction.
      ridge: of least squares, as a share of the mean of the diagonal.
      gain: factor on the whole correction, 0..1.
      clip: largest |a_i / b_i| of a closed-loop fit.
      per: one set of coefficients per channel, one per element of a latent (where errors differ by place, as they do under
        fixed position embeddings), or a single one (say for grey pixels).
    """

    mode: Literal["ls2", "inplace", "window1", "window1_alt", "off"] = "ls2"
    fit: Literal["closed_loop", "paper", "ptqd", "tac"] = "closed_loop"
    relative: float = 0.5
    prior: float = 0.1
    ridge: float = 1e-3
    gain: float = 1.0
    clip: float = 0.5
    per: Per = "channel"

    def __post_init__(self):
        allowed = {
            "mode": ("ls2", "inplace", "window1", "window1_alt", "off"),
            "fit": ("closed_loop", "paper", "ptqd", "tac"),
            "per": ("channel", "position", "scalar"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, found {getattr(self, name)!r}")
        if (self.mode == "ls2" and self.fit != "closed_loop") or (
            self.mode == "window1_alt" and self.fit == "closed_loop"
        ):
            raise ValueError(f"mode {self.mode!r} cannot be fitted by {self.fit!r}: see TcecConfig")
        if not 0 <= self.gain <= 1 or self.ridge < 0 or self.clip <= 0:
            raise ValueError(
                f"expected gain in [0, 1], ridge >= 0, clip > 0, found {self.gain}, {self.ridge}, {self.clip}"
            )


DEFAULT = TcecConfig()


class Tcec(NamedTuple):
    """x_{i+1} becomes x_{i+1} - (sum_j weights_ij o_{i-j} + offset_i); weights that reach before step 0 are inert.

    C is the number of channels, the number of elements of a latent, or 1.

    Attributes:
      weights: on the W newest outputs, newest first; a and b of the paper's symbols for W = 2.
      offset: c.
    """

    weights: Float[Array, "T W C"]
    offset: Float[Array, "T C"]


def tcec(coefficients: Tcec) -> Corrector:
    """The corrector; its memory is W - 1 outputs, its cost W + 1 multiply-adds per element, computed in float32.

    Raises:
      ValueError: latents of another number of channels (when sampled).
    """
    window, size = coefficients.weights.shape[1:]

    def init(x):
        if size not in (1, x.shape[-1], x[0].size):
            found = f"{x.shape[-1]} channels and {x[0].size} elements"
            raise ValueError(f"x: expected {size} channels or elements, found {found}; calibrate this model")
        return empty(x, window - 1)

    def on_state(older, x, out, i):
        outputs = (out, *older)
        correction = combine(coefficients.weights[i], coefficients.offset[i], outputs)
        return (x.astype(jnp.float32) - correction).astype(x.dtype), outputs[:-1]

    return Corrector(init=init, on_state=on_state)


def combine(weights: Float[Array, "W C"], offset: Float[Array, "C"], outputs: tuple[Array, ...]) -> Array:
    """sum_j weights_j o_j + offset, float32; C runs over the last axis of the outputs, or over all but the batch."""
    inner = outputs[0].shape[1:]
    shape = inner if weights.shape[-1] == math.prod(inner) else (*[1] * (len(inner) - 1), -1)
    wide = lambda v: v.astype(jnp.float32).reshape(1, *shape)
    return sum(wide(w) * o.astype(jnp.float32) for w, o in zip(weights, outputs, strict=True)) + wide(offset)


def calibrate(
    reference: Model | Trajectory,
    quantized: Model,
    solver: LinearSolver,
    x: Float[Array, "N ... C"],
    cond: Any,
    config: TcecConfig = DEFAULT,
    key: Array | None = None,
) -> Tcec:
    """Coefficients from N noises and conditions, without gradients: N T evaluations of either model.

    Args:
      reference: full precision, or its trajectory from x where several corrections are fitted to one.
      quantized: what will be sampled, with its cache if it has one.
      solver: of the runs to correct.
      x: noises; shard them over a mesh where one device cannot hold them. Fewer than 32 overfit.
      cond: of all noises.
      config: see `TcecConfig`.
      key: of the noise that a stochastic solver draws, shared by both runs.

    Raises:
      ValueError: noises that are not finite, or a stochastic solver without key.
    """
    full = reference if isinstance(reference, Trajectory) else trajectory(reference, solver, x, cond, key)
    if config.mode == "off":
        size = _size(x[0], config.per)
        return Tcec(jnp.zeros((solver.steps, 1, size)), jnp.zeros((solver.steps, size)))
    if config.fit == "closed_loop":
        return _closed_loop(quantized, solver, full, cond, config, key)
    rounded = shared_outputs(quantized, solver, full.states, cond)
    slope, offset = local_error(config, rounded, full.outputs)
    return from_local_error(solver, slope, offset, config)


def from_local_error(
    solver: LinearSolver, slope: Float[Array, "T C"], offset: Float[Array, "T C"], config: TcecConfig
) -> Tcec:
    """The correction for local errors e_i = slope_i o_i + offset_i, window by `config.mode`."""
    earlier = 0 if config.mode == "inplace" else 1
    weights, constant = window_weights(solver, slope, earlier), window_weights(solver, offset, earlier).sum(1)
    if config.mode == "window1_alt":
        weights[::2], constant[::2] = 0, 0  # errors of steps i - 1 and i at odd i, nothing in between
        if solver.steps % 2:  # the last step stands alone
            alone, shift = (window_weights(solver, v, 0)[-1] for v in (slope, offset))
            weights[-1, : len(alone)], constant[-1] = alone, shift.sum(0)
    return Tcec(config.gain * jnp.asarray(weights), config.gain * jnp.asarray(constant))


def local_error(
    config: TcecConfig, rounded: Float[Array, "T N ... C"], full: Float[Array, "T N ... C"]
) -> tuple[Float[Array, "T C"], Float[Array, "T C"]]:
    """(K, c) of e = rounded - full ~ K rounded + c on shared inputs, one fit per step and channel.

    "paper" K = <o~, e> / <o~, o~> shrinks towards zero where e is independent of o (attenuation); "ptqd" regresses e = k o + b
    and inverts: K = k / (1 + k), c = b / (1 + k).
    """
    mean = lambda v: _mean(v, config.per)
    error = rounded - full
    if config.fit == "paper":
        slope = mean(rounded * error) / mean(rounded**2)
        return slope, jnp.zeros_like(slope)
    if config.fit == "ptqd":
        mean_full, mean_error = mean(full), mean(error)
        k = (mean(full * error) - mean_full * mean_error) / (mean(full**2) - mean_full**2)
        return k / (1 + k), (mean_error - k * mean_full) / (1 + k)
    kept = relative_fit(rounded, full, mean, config.relative, config.prior, rounded[0, 0].size)
    return 1 - kept, jnp.zeros_like(kept)


def relative_fit(rounded: Array, full: Array, mean: Any, relative: float, prior: float, size: int) -> Array:
    """K that minimises (1 - l1) sum (K q - r)^2 + l1 N sum ((K q - r) / r)^2 + l2 N (K - 1)^2, averaged over samples (TAC).

    Sums over elements are `size` times means; r is kept away from 0 by 1e-7.
    """
    safe = jnp.where(full < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(full), 1e-7)
    ratio = rounded / safe
    up = (1 - relative) * mean(rounded * full) + relative * size * mean(ratio) + prior
    down = (1 - relative) * mean(rounded**2) + relative * size * mean(ratio**2) + prior
    return up / down


def _size(latent: Float[Array, "... C"], per: Per) -> int:
    return {"channel": latent.shape[-1], "position": latent.size, "scalar": 1}[per]


def _mean(v: Float[Array, "T N ... C"], per: Per) -> Float[Array, "T C"]:
    return v.reshape(len(v), -1, _size(v[0, 0], per)).mean(1)


@functools.partial(jax.jit, static_argnames="config")
@compressed
def _closed_loop(quantized: Model, solver: LinearSolver, full: Trajectory, cond: Any, config: TcecConfig, key) -> Tcec:
    window = 1 if config.mode == "inplace" else 2
    size = _size(full.states[0, 0], config.per)
    a, b = jnp.asarray(solver.a), jnp.asarray(solver.b)

    def on_state(before, step: Step):
        deviation, fixed = step.free - step.target, jnp.zeros((window, size))
        if config.mode == "window1":  # the second weight follows from the step before
            fixed = fixed.at[1].set(a[step.i] * before)
            deviation = deviation - combine(fixed, jnp.zeros(size), step.outputs)
        chosen = step.outputs[:1] if config.mode == "window1" else step.outputs
        found, offset = least_squares(deviation, chosen, config.ridge, config.per)
        limit = config.clip * jnp.abs(b[step.i, 0])
        found = found.at[0].set(jnp.clip(found[0], -limit, limit))
        weights = config.gain * fixed.at[: len(chosen)].add(found)
        offset = config.gain * offset
        return step.free - combine(weights, offset, step.outputs), weights[0], Tcec(weights, offset)

    blank = Tcec(jnp.zeros((solver.steps, window, size)), jnp.zeros((solver.steps, size)))
    options = dict(memory=jnp.zeros(size), window=window, key=key)
    return closed_loop(quantized, solver, full, cond, blank, on_state=on_state, **options)


def least_squares(
    target: Float[Array, "N ... C"], features: tuple[Array, ...], ridge: float, per: Per
) -> tuple[Float[Array, "W C"], Float[Array, "C"]]:
    """(w, c) minimising |target - sum_j w_j f_j - c|^2 + ridge mean(diag G) |w|^2 per channel, G of the centred features."""
    flat = lambda v: v.reshape(-1, _size(v[0], per)).astype(jnp.float32)
    y, x = flat(target), jnp.stack([flat(f) for f in features])  # [S, C], [W, S, C]
    x_mean, y_mean = x.mean(1), y.mean(0)
    x, y = x - x_mean[:, None], y - y_mean[None]
    gram, right = jnp.einsum("jsc,ksc->cjk", x, x), jnp.einsum("jsc,sc->cj", x, y)
    scale = jnp.trace(gram, axis1=1, axis2=2) / len(features)
    damp = jnp.where(scale > 0, ridge * scale + 1e-7 * scale, 1.0)
    eye = jnp.eye(len(features))[None]
    weights = jnp.linalg.solve(gram + damp[:, None, None] * eye, right[..., None])[..., 0].T
    return weights, y_mean - (weights * x_mean).sum(0)
