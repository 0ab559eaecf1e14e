"""How far the cached quantity of each step is from that of the steps after it, on full runs of a calibration set."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.cache.recorder import record, recorder
from jaxcomp.sampling.denoiser import Denoiser, at_output
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import Store, output, residual

Mode = Literal["trunk", "out", "out_res"]
MODES = ("trunk", "out", "out_res")


def cut(denoiser: Denoiser, mode: Mode) -> Denoiser:
    """The denoiser cut where the mode caches: "trunk" keeps the trunk's residual, "out" the output, "out_res" output plus input.

    The paper's velocity points to the data, v = -out: its residual v - x is -(out + x).

    Raises:
      ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; expected one of {', '.join(MODES)}")
    return denoiser if mode == "trunk" else at_output(denoiser)


def store(mode: Mode) -> Store:
    """What the mode keeps of a computed step, for a denoiser that was `cut`."""
    return output() if mode == "out" else residual(opposed=mode == "out_res")


class Profile(NamedTuple):
    """Relative L1 errors of reuse, E[a, j] = ||r_a - r_b||_1 / ||r_b||_1 with b = a + 1 + j; NaN where b >= T.

    Attributes:
      ratio_of_sums: norms are summed over the calibration set, then divided.
      mean_of_ratios: the ratio is taken per sample, then averaged.
    """

    ratio_of_sums: Float[np.ndarray, "T W"]
    mean_of_ratios: Float[np.ndarray, "T W"]


def profile(
    pipeline: Pipeline,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any = None,
    *,
    mode: Mode = "trunk",
    window: int = 8,
) -> Profile:
    """Measures E for distances 1..window on full runs (ERTACache, arXiv 2508.21091, the policy calibration), in one scan.

    Memory: `window` cached quantities of the calibration batch.

    Raises:
      ValueError: window < 1, or an unknown mode.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    steps, kept = pipeline.solver.steps, store(mode)

    def observe(memory, h, c, new, i):
        ring, table = memory
        r = kept.compute(None, lambda h, c: new, h, c, i)[1]
        per_sample = lambda v: jnp.abs(v).sum(tuple(range(-r.ndim + 1, 0)), dtype=jnp.float32)  # [..., B]
        far, size = jax.lax.map(lambda old: per_sample(old - r), ring), per_sample(r)
        sums = far.sum(1) / jnp.maximum(size.sum(), 1e-30)
        means = (far / jnp.maximum(size, 1e-30)[None]).mean(1)
        return jnp.concatenate([r[None], ring[:-1]]), table.at[i].set(jnp.stack([sums, means]))

    def init(h, c):
        return jnp.zeros((window, *h.shape), h.dtype), jnp.zeros((steps, 2, window))

    measured = pipeline.replace(denoiser=cut(pipeline.denoiser, mode))
    table = np.asarray(record(measured, recorder(init, observe), params, x, cond)[1], np.float64)
    return Profile(*(_from_source(table[:, k]) for k in (0, 1)))


def _from_source(to: Float[np.ndarray, "T W"]) -> Float[np.ndarray, "T W"]:
    """E by the step that is reused (a) from a table by the step that reuses (b = a + 1 + j)."""
    steps, window = to.shape
    a, j = np.indices((steps, window))
    inside = a + 1 + j < steps
    return np.where(inside, to[np.minimum(a + 1 + j, steps - 1), j], np.nan)
