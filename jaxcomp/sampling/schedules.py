"""Noise schedules and the grids of noise levels that a sampler walks down; float64 numpy, before any tracing."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Spacing = Literal["leading", "trailing", "linspace"]


class Grid(NamedTuple):
    """Noise levels x = alpha x0 + sigma n of T steps, in the order of sampling.

    Attributes:
      t: what the network is told at the start of each step.
      alpha: signal level at the start of each step, and at the end of the last one.
      sigma: noise level, likewise.
    """

    t: Float[np.ndarray, "T"]
    alpha: Float[np.ndarray, "T+1"]
    sigma: Float[np.ndarray, "T+1"]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.t)


def check_grid(grid: Grid) -> Grid:
    """The grid itself.

    Raises:
      ValueError: fewer than one step, lengths that do not fit, values that are not finite, or a ratio sigma / alpha that does
        not fall strictly from step to step.
    """
    t, alpha, sigma = (np.asarray(v, np.float64) for v in grid)
    if t.ndim != 1 or len(t) < 1 or alpha.shape != (len(t) + 1,) or sigma.shape != alpha.shape:
        shapes = f"t {t.shape}, alpha {alpha.shape}, sigma {sigma.shape}"
        raise ValueError(f"grid: expected t [T], alpha and sigma [T+1] with T >= 1, found {shapes}")
    if not all(np.isfinite(v).all() for v in (t, alpha, sigma)) or min(alpha.min(), sigma.min()) < 0:
        raise ValueError("grid: expected finite levels of at least 0, found others; check the schedule's arguments")
    angle = np.arctan2(sigma, alpha)  # rises and falls with sigma / alpha, also where alpha is 0
    if (rising := np.flatnonzero(np.diff(angle) >= 0)).size:
        i = int(rising[0])
        found = f"{sigma[i]:.6g}/{alpha[i]:.6g} then {sigma[i + 1]:.6g}/{alpha[i + 1]:.6g}"
        raise ValueError(
            f"grid: sigma / alpha must fall at every step, found {found} at step {i}; sort the levels in sampling order "
            "and remove repeated ones"
        )
    return Grid(t, alpha, sigma)


def linear_betas(train_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Float[np.ndarray, "N"]:
    """Variances of the forward process, evenly spaced (DDPM, arXiv 2006.11239)."""
    return np.linspace(start, end, train_steps, dtype=np.float64)


def scaled_linear_betas(train_steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Float[np.ndarray, "N"]:
    """Variances whose square roots are evenly spaced (latent diffusion, arXiv 2112.10752)."""
    return np.linspace(start**0.5, end**0.5, train_steps, dtype=np.float64) ** 2


def cosine_betas(train_steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Float[np.ndarray, "N"]:
    """Variances of the cosine schedule (arXiv 2102.09672, equation 17), cut at `largest`."""
    u = np.arange(train_steps + 1, dtype=np.float64) / train_steps
    abar = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], largest)


def timesteps(train_steps: int, steps: int, spacing: Spacing = "trailing") -> np.ndarray:
    """`steps` of the training timesteps in falling order, int64 (spacings of arXiv 2305.08891, table 2).

    Raises:
      ValueError: steps outside of 1..train_steps, or an unknown spacing.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must lie in 1..{train_steps} (the schedule's length), got {steps}")
    if spacing == "leading":
        return np.arange(steps)[::-1] * (train_steps // steps)
    if spacing == "trailing":
        return np.round(train_steps - np.arange(steps) * (train_steps / steps)).astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(train_steps - 1, 0, steps)).astype(np.int64)
    raise ValueError(f"spacing {spacing!r} is unknown; expected 'leading', 'trailing' or 'linspace'")


def vp_grid(betas: Float[np.ndarray, "N"], steps: int, spacing: Spacing = "trailing") -> Grid:
    """Levels of a variance-preserving process at `steps` of its timesteps; the last step ends without noise.

    Raises:
      ValueError: betas outside of (0, 1), or as `timesteps` says.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas: expected a vector inside (0, 1), found shape {betas.shape}")
    t = timesteps(len(betas), steps, spacing)
    abar = np.append(np.cumprod(1 - betas)[t], 1.0)
    return check_grid(Grid(t.astype(np.float64), np.sqrt(abar), np.sqrt(1 - abar)))


def flow_grid(steps: int, shift: float = 1.0, time_scale: float = 1000.0) -> Grid:
    """Levels x = (1 - s) x0 + s n from s = 1 to 0, moved towards noise by s' = shift s / (1 + (shift - 1) s).

    The network is told `time_scale` s'.
    """
    s = np.linspace(1.0, 0.0, steps + 1, dtype=np.float64)
    return flow_levels(shift * s / (1 + (shift - 1) * s), time_scale)


def flow_levels(s: Float[np.ndarray, "T+1"], time_scale: float = 1000.0) -> Grid:
    """The flow-matching grid through given noise levels. Raises ValueError as `check_grid` says."""
    s = np.asarray(s, np.float64)
    return check_grid(Grid(time_scale * s[:-1], 1 - s, s))


def karras_grid(steps: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0) -> Grid:
    """Noise levels of EDM (arXiv 2206.00364, equation 5) with alpha = 1; the network is told ln(sigma) / 4."""
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    ramp = np.arange(steps, dtype=np.float64) / (steps - 1)
    sigma = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    return check_grid(Grid(np.log(sigma) / 4, np.ones(steps + 1), np.append(sigma, 0.0)))
