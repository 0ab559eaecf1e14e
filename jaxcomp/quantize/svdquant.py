"""SVDQuant: a low-rank branch in high precision takes the outliers, so that the rest survives 4 bits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.core.leaf import replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.formats import ActivationQuantizer, Grid, LowRankArray
from jaxcomp.formats.grid import fake_quantize, qparams
from jaxcomp.formats.smoothed import SmoothedArray
from jaxcomp.quantize.scheme import KERNELS, Target, need_data, over_batch, targets

_POINTS = 20  # of the search for the smoothing exponents
_ROWS = 256  # surrogate inputs on which output errors are measured


class Split(NamedTuple):
    """W diag(s) ~ up down + Q(rest), per matrix.

    Attributes:
      divisor: s [K], the inputs are divided by it.
      up: [N, r].
      down: [r, K].
      rest: W diag(s) - up down, still to be rounded, [N, K].
      error: mean squared error of the output, over that of the plain product.
    """

    divisor: Float[Array, "k"]
    up: Float[Array, "n r"]
    down: Float[Array, "r k"]
    rest: Float[Array, "n k"]
    error: Float[Array, ""]


def low_rank(w: Float[Array, "n k"], rank: int) -> tuple[Float[Array, "n r"], Float[Array, "r k"]]:
    """(up, down), the best approximation of w by `rank`, singular values shared evenly."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def rounded(w: Float[Array, "n k"], grid: Grid) -> Float[Array, "n k"]:
    """The nearest points of the matrix's own grid."""
    return fake_quantize(w, *qparams(w, grid), grid)


def surrogate_inputs(gram: Float[Array, "k k"], count: Float[Array, ""], key: jax.Array) -> Float[Array, "m k"]:
    """Gaussian rows with the second moments of the inputs: what the statistics keep of them."""
    values, vectors = jnp.linalg.eigh(gram / count)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]
    return jax.random.normal(key, (_ROWS, len(gram))) @ root.T


def output_error(
    w: Float[Array, "n k"], split: Split, x: Float[Array, "m k"], grid: Grid, act: ActivationQuantizer | None
) -> Float[Array, ""]:
    """|| X' down^T up^T + Q(X') Q(rest)^T - X W^T ||^2 / || X W^T ||^2 with X' = X / s."""
    smooth = x / split.divisor[None]
    coded = smooth if act is None else act.fake(smooth)
    out = (smooth @ split.down.T) @ split.up.T + coded @ rounded(split.rest, grid).T
    exact = x @ w.T
    return jnp.mean((out - exact) ** 2) / jnp.maximum(jnp.mean(exact**2), 1e-30)


def smoothing_divisors(w: Float[Array, "n k"], max_abs: Float[Array, "k"]) -> Float[Array, "p k"]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for alpha = 0, 1/20, ..., and all ones; geometric mean 1 each."""
    alpha = jnp.arange(_POINTS, dtype=jnp.float32)[:, None] / _POINTS
    log_x, log_w = (jnp.log(jnp.maximum(v, 1e-5))[None] for v in (max_abs, jnp.abs(w).max(0)))
    log_s = alpha * log_x - (1 - alpha) * log_w
    return jnp.concatenate([jnp.exp(log_s - log_s.mean(1, keepdims=True)), jnp.ones((1, w.shape[1]))])


def split_matrix(
    w: Float[Array, "n k"],
    max_abs: Float[Array, "k"],
    x: Float[Array, "m k"],
    grid: Grid,
    act: ActivationQuantizer | None,
    rank: int,
    iterations: int,
    smooth: bool,
) -> Split:
    """The branch and the rest of one matrix.

    The divisor is the candidate with the least output error after a plain SVD. Then L = SVD_r(W' - Q(R)), R = W' - L in turns,
    until the output error rises for the first time (at most `iterations` turns); the best turn is kept.
    """

    def start(divisor):
        scaled = w * divisor[None]
        up, down = low_rank(scaled, rank)
        first = Split(divisor, up, down, scaled - up @ down, jnp.float32(0))
        return first._replace(error=output_error(w, first, x, grid, act))

    candidates = smoothing_divisors(w, max_abs) if smooth else jnp.ones((1, w.shape[1]))
    errors = lax.map(lambda divisor: start(divisor).error, candidates)
    first = start(candidates[jnp.argmin(errors)])
    scaled = w * first.divisor[None]

    def turn(carry):
        best, i, _ = carry
        up, down = low_rank(scaled - rounded(best.rest, grid), rank)
        new = Split(best.divisor, up, down, scaled - up @ down, jnp.float32(0))
        new = new._replace(error=output_error(w, new, x, grid, act))
        better = new.error < best.error
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), i + 1, better

    going = lambda carry: (carry[1] < iterations) & carry[2]
    return lax.while_loop(going, turn, (first, jnp.int32(0), jnp.array(True)))[0]


@functools.partial(jax.jit, static_argnames=("rank", "iterations", "smooth"))
def _split(w, gram, count, max_abs, grid, act, rank, iterations, smooth):
    def one(w, gram, count, max_abs):
        x = surrogate_inputs(gram, count, jax.random.key(0))
        return split_matrix(w, max_abs, x, grid, act, rank, iterations, smooth)

    return over_batch(one, w.ndim - 2)(w, gram, count, max_abs)


def svdquant(
    bits: int = 4,
    *,
    act_bits: int | None = 4,
    rank: int = 32,
    group_size: int = 64,
    iterations: int = 100,
    smooth: bool = True,
    rules: Sequence[Rule] = KERNELS,
    **scheme: Any,
) -> Transform:
    """SVDQuant (Li et al., ICLR 2025, arXiv 2411.05007): y = X' L1 L2 + Q(X') Q(R), X' = X / s, W diag(s) = L1 L2 + R.

    The leaf is a `LowRankArray` over a `QuantizedArray`, behind a `SmoothedArray` if `smooth`. Approximations: output errors are
    measured on Gaussian inputs with the measured second moments; activations have one scale per token, not per group.

    Args:
      bits: of the rest R.
      act_bits: of the inputs of R.
      rank: of the branch, float32; scale it with the model (32 of 3072 in the paper's).
      group_size: inputs that share a scale of R.
      iterations: turns of the refinement, at most.
      smooth: search for s; False keeps it at one.
      rules: which leaves, and options per leaf.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`.

    Raises:
      ValueError: no calibration data; rank outside of 1..min(N, K) of a leaf.
    """
    defaults = {"bits": bits, "act_bits": act_bits, "group_size": group_size, **scheme}

    def update(params: Any, stats: Any) -> Any:
        need_data(stats, "svdquant")
        chosen = targets(params, rules, defaults, stats)
        measured = stats(params, {"gram", "count", "max_abs"}, only={t.path for t in chosen}.__contains__)
        return replace_leaves(params, {t.path: _leaf(t, measured, rank, iterations, smooth) for t in chosen})

    return stateless(update)


def _leaf(t: Target, measured: Mapping[str, Any], rank: int, iterations: int, smooth: bool) -> Any:
    if not 1 <= rank <= min(t.matrix.shape[-2:]):
        raise ValueError(f"{t.path}: rank must be in 1..{min(t.matrix.shape[-2:])}, got {rank}")
    if t.path not in measured:
        raise ValueError(f"{t.path}: no statistics of its inputs; leave it out by a rule with skip=True")
    found, batch = measured[t.path], t.matrix.shape[:-2]
    count = jnp.broadcast_to(found["count"], batch)
    grid, act = t.scheme.grid, t.scheme.act
    split = _split(t.matrix, found["gram"], count, found["max_abs"], grid, act, rank, iterations, smooth)
    base = t.rounded(split.rest)
    leaf = LowRankArray(base, split.down, split.up, base.layout, 1.0, base.dtype_name)
    return SmoothedArray.of(leaf, split.divisor) if smooth else leaf
