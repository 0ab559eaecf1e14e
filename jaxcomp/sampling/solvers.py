"""Samplers as one linear recurrence (see `LinearSolver`); every constant is computed in float64 before tracing.

Output o of a step, by solver: the noise for `ddpm` and `ddim`, the velocity n - x0 for `euler_flow`, the clean sample D for
`dpmpp_2m` and `edm_heun`. What the network predicts is turned into o by `skip` and `gain`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxcomp.sampling.schedules import Grid, check_grid

Prediction = Literal["eps", "x0", "v", "flow"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearSolver:
    """T evaluations of a network F, each followed by a linear update with noise z.

    o_i     = skip_i x_i + gain_i F(in_scale_i x_i, t_i)
    x_{i+1} = a_i x_i + sum_j b_ij o_{i-j} + noise_i z,   j = 0 .. p-1

    Attributes:
      t: what the network is told.
      in_scale: of the network's input.
      skip: see above.
      gain: see above.
      a: see above.
      b: see above; coefficients that would reach before the first step are 0.
      noise: see above.
      name: of the constructor.
      stochastic: whether any noise is drawn; `sample` then needs a key.
      init_std: standard deviation of the initial noise.
      digest: short hash of name and all coefficients; plans and calibrations are kept under it.
    """

    t: Float[Array, "T"]
    in_scale: Float[Array, "T"]
    skip: Float[Array, "T"]
    gain: Float[Array, "T"]
    a: Float[Array, "T"]
    b: Float[Array, "T p"]
    noise: Float[Array, "T"]
    name: str = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})
    init_std: float = dataclasses.field(metadata={"static": True})
    digest: str = dataclasses.field(metadata={"static": True})

    @property
    def steps(self) -> int:
        """T: how often the network would be evaluated without a cache."""
        return self.t.shape[0]

    def initial(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Noise to start from."""
        return self.init_std * jax.random.normal(key, shape)


def _solver(name: str, t, a, b, *, in_scale=1.0, skip=0.0, gain=1.0, noise=0.0, init_std=1.0) -> LinearSolver:
    steps = len(t)
    vectors = [np.broadcast_to(np.asarray(v, np.float64), (steps,)) for v in (t, in_scale, skip, gain, a, noise)]
    b = np.asarray(b, np.float64).reshape(steps, -1)
    if not all(np.isfinite(v).all() for v in (*vectors, b)):
        raise ValueError(
            f"{name}: a coefficient is not finite; the grid's levels are too close to 0 for this prediction"
        )
    digest = hashlib.sha256(name.encode())
    for v in (*vectors, b):
        digest.update(np.ascontiguousarray(v, np.float32).tobytes())
    t, in_scale, skip, gain, a, noise = (v.astype(np.float32) for v in vectors)
    hashed = digest.hexdigest()[:16]
    b = b.astype(np.float32)
    return LinearSolver(t, in_scale, skip, gain, a, b, noise, name, bool(noise.any()), float(init_std), hashed)


def _conversion(target: Prediction, prediction: Prediction, alpha, sigma) -> tuple[np.ndarray, np.ndarray]:
    """(skip, gain) with target = skip x + gain prediction, from x = alpha x0 + sigma eps and the definition of each."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    row = {  # prediction = row . (x0, eps)
        "x0": (one, zero),
        "eps": (zero, one),
        "v": (-sigma, alpha),
        "flow": (-one, one),
    }
    for name in (target, prediction):
        if name not in row:
            raise ValueError(f"prediction {name!r} is unknown; expected one of {sorted(row)}")
    if target == prediction:
        return zero, one
    (p, q), (u, v) = row[prediction], row[target]
    determinant = alpha * q - sigma * p  # solves x = alpha x0 + sigma eps, F = p x0 + q eps
    if (np.abs(determinant) < 1e-12).any():
        i = int(np.argmin(np.abs(determinant)))
        raise ValueError(
            f"the {prediction} prediction says nothing about {target} at step {i} (alpha {alpha[i]:.3g}, sigma {sigma[i]:.3g}); "
            "use another grid or prediction"
        )
    return (u * q - v * p) / determinant, (v * alpha - u * sigma) / determinant


def ddim(grid: Grid, prediction: Prediction = "eps", eta: float = 0.0) -> LinearSolver:
    """DDIM (arXiv 2010.02502, equation 12); eta = 1 is ancestral sampling.

    Raises:
      ValueError: eta outside of [0, 1], an invalid grid, or a prediction that cannot be converted to noise on it.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    return _ancestral("ddim", grid, prediction, eta**2)


def ddpm(
    grid: Grid, prediction: Prediction = "eps", variance: Literal["posterior", "beta"] = "posterior"
) -> LinearSolver:
    """Ancestral sampling of DDPM (arXiv 2006.11239, algorithm 2), on any grid; the last step adds no noise.

    Args:
      grid: variance-preserving.
      prediction: what the network predicts.
      variance: of a step: beta (1 - abar') / (1 - abar), or beta.

    Raises:
      ValueError: as `ddim`, or an unknown variance.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance {variance!r} is unknown; expected 'posterior' or 'beta'")
    return _ancestral("ddpm", grid, prediction, 1.0, variance == "beta")


def _ancestral(name: str, grid: Grid, prediction: Prediction, share: float, large: bool = False) -> LinearSolver:
    """The family of DDIM: `share` of the posterior variance is drawn anew at each step; `large`: noise variance beta."""
    t, alpha, sigma = check_grid(grid)
    a0, a1, s0, s1 = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    beta = 1 - (a0 / a1) ** 2
    drawn = share * beta * (s1 / s0) ** 2
    noise = np.sqrt(np.where(s1 > 0, beta if large else drawn, 0.0))
    skip, gain = _conversion("eps", prediction, a0, s0)
    mean = np.sqrt(np.maximum(s1**2 - drawn, 0))
    return _solver(name, t, a1 / a0, mean - s0 * a1 / a0, skip=skip, gain=gain, noise=noise)


def dpmpp_2m(grid: Grid, prediction: Prediction = "eps") -> LinearSolver:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2).

    The first step is of first order; so is the last one if there are fewer than 15 steps or the grid ends without noise.

    Raises:
      ValueError: an invalid grid, or a prediction that cannot be converted to clean samples on it.
    """
    t, alpha, sigma = check_grid(grid)
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite where a level is 0
        h = np.diff(np.log(alpha) - np.log(sigma))
        ratio = h[1:] / (2 * h[:-1])  # 1 / (2 r)
    decay = -np.expm1(-h) * alpha[1:]  # -a' (e^-h - 1)
    second = np.append(0.0, ratio)
    if len(t) < 15 or sigma[-1] == 0:
        second[-1] = 0.0
    b = np.stack([decay * (1 + second), -decay * second], 1)
    skip, gain = _conversion("x0", prediction, alpha[:-1], sigma[:-1])
    return _solver("dpmpp_2m", t, sigma[1:] / sigma[:-1], b, skip=skip, gain=gain, init_std=sigma[0])


def euler_flow(grid: Grid, prediction: Prediction = "flow") -> LinearSolver:
    """Euler steps of the flow x' = v in the noise level, v = n - x0 (arXiv 2210.02747).

    Raises:
      ValueError: an invalid grid, alpha + sigma other than 1, or a prediction that cannot be converted to velocities on it.
    """
    t, alpha, sigma = check_grid(grid)
    if not np.allclose(alpha + sigma, 1):
        raise ValueError("euler_flow: expected alpha + sigma = 1; make the grid with flow_grid or flow_levels")
    skip, gain = _conversion("flow", prediction, alpha[:-1], sigma[:-1])
    return _solver("euler_flow", t, np.ones(len(t)), np.diff(sigma), skip=skip, gain=gain, init_std=sigma[0])


def edm_heun(
    grid: Grid, sigma_data: float = 0.5, churn: float = 0.0, churn_range: tuple[float, float] = (0.0, np.inf)
) -> LinearSolver:
    """Heun steps of EDM (arXiv 2206.00364, algorithm 2) with its preconditioning (table 1): T = 2 N - 1 evaluations.

    With r = sigma'/sigma the Euler step is x' = r x + (1 - r) D, and because x can be recovered from x' and D, Heun's
    correction is x' + (1 - r) / (2 r) (D' - D): a second term of the recurrence, nothing else. Noise that a step of the
    algorithm adds at its start is added at the end of the one before; that of the first step is in `init_std`.

    Args:
      grid: of `karras_grid`, alpha = 1.
      sigma_data: standard deviation of the data.
      churn: S_churn; 0 is the deterministic sampler. S_noise is 1.
      churn_range: (S_tmin, S_tmax).

    Raises:
      ValueError: an invalid grid, alpha other than 1, a grid that does not end at 0, or churn < 0.
    """
    _, alpha, sigma = check_grid(grid)
    if not np.allclose(alpha, 1) or sigma[-1] != 0 or churn < 0:
        raise ValueError(
            "edm_heun: expected alpha = 1, a last sigma of 0 and churn >= 0; make the grid with karras_grid"
        )
    start, end = sigma[:-1], sigma[1:]
    inside = (start >= churn_range[0]) & (start <= churn_range[1])
    raised = start * (1 + np.where(inside, min(churn / grid.steps, np.sqrt(2) - 1), 0.0))
    added = np.append(np.sqrt(raised**2 - start**2)[1:], 0.0)  # at the end of each step
    levels, a, b, noise = [], [], [], []
    for s, s_end, z in zip(raised, end, added, strict=True):
        r = s_end / s
        levels, a, b, noise = [*levels, s], [*a, r], [*b, (1 - r, 0.0)], [*noise, 0.0 if s_end else z]
        if s_end:
            heun = (1 - r) / (2 * r)
            levels, a, b, noise = [*levels, s_end], [*a, 1.0], [*b, (heun, -heun)], [*noise, z]
    levels = np.array(levels)
    norm = np.sqrt(levels**2 + sigma_data**2)
    preconditioned = dict(in_scale=1 / norm, skip=(sigma_data / norm) ** 2, gain=levels * sigma_data / norm)
    return _solver("edm_heun", np.log(levels) / 4, a, b, noise=noise, init_std=raised[0], **preconditioned)


def anonymous(solver: LinearSolver) -> LinearSolver:
    """The solver without its digest: as an argument of a jitted function, others of its kind do not compile it again."""
    return dataclasses.replace(solver, digest="")


def coefficients(solver: LinearSolver, i: int | Array, dtype: jnp.dtype) -> LinearSolver:
    """The scalars of one step (`b` a vector of p), in the dtype of the latents; `t` stays float32."""
    row = jax.tree.map(lambda v: jnp.asarray(v)[i].astype(dtype), solver)
    return dataclasses.replace(row, t=jnp.asarray(solver.t)[i])


def advance(k: LinearSolver, x: Float[Array, "B ..."], outputs: tuple[Array, ...]) -> Float[Array, "B ..."]:
    """a x + sum_j b_j o_j of one step's `coefficients`, outputs newest first; without noise."""
    return k.a * x + sum(k.b[j] * o for j, o in enumerate(outputs))
