"""GPTQ: rounds column by column and corrects the columns that are not yet rounded."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaxcomp.core.leaf import replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.formats import Grid, QuantizedArray
from jaxcomp.formats.grid import decode, encode, qparams
from jaxcomp.quantize.scheme import GRAM_BYTES, KERNELS, Target, need_data, over_batch, targets

_BLOCK = 128  # columns between two lazy updates of the whole matrix


def inverse_factor(h: Float[Array, "k k"], damp: float) -> Float[Array, "k k"]:
    """Upper triangular U with U^T U = (H + damp mean(diag H) I)^-1; not finite where H is not positive definite.

    The Cholesky factor of the inverse without the inverse: J H J = L L^T with J the reversal gives H = A A^T, A = J L J upper,
    and U = A^-1.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    damped = h + damp * jnp.mean(jnp.diag(h)) * eye
    a = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(a, eye, lower=False)


def quantize_matrix(
    w: Float[Array, "n k"],
    h: Float[Array, "k k"],
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    scale_dtype: str = "float32",
) -> tuple[Float[Array, "n k"], Float[Array, "m g"], Float[Array, "m g"]]:
    """Values on the grid that minimise tr((W - Q) H (W - Q)^T) greedily, their scales and zero points. float32 throughout.

    For column j in order: q_j = Q(w_j), e = (w_j - q_j) / U_jj, W_{:,j:} -= e U_{j,j:}. Zeros of W (pruned weights) stay zero;
    columns whose input never fires (H_jj = 0) become zero. Group scales come from the current W when its first column is
    reached, from the original W if `static_groups`; `act_order` visits columns by descending H_jj, and then groups are static.
    NaN if H is not positive definite.
    """
    k = w.shape[1]
    dead = jnp.diag(h) == 0
    w = jnp.where(dead[None], 0.0, w)
    h = h + jnp.diag(dead.astype(h.dtype))
    order = jnp.argsort(-jnp.diag(h)) if act_order else jnp.arange(k)
    u = inverse_factor(h[order][:, order], damp)
    groups = order // (k // grid.groups(k))

    def grid_of(w, grid):
        scale, zero = qparams(w, grid)
        return scale.astype(scale_dtype).astype(jnp.float32), zero

    row = Grid(grid.bits, grid.levels, grid.symmetric)
    fresh = None if grid.group_size <= 0 or act_order or static_groups else functools.partial(grid_of, grid=row)
    values, scale, zero = _sweep(w[:, order], u, *grid_of(w, grid), groups, grid, fresh)
    values = jnp.where(jnp.isfinite(u).all(), values, jnp.nan)
    return values[:, jnp.argsort(order)], scale, zero


def _sweep(w, u, scale, zero, groups: Int[Array, "k"], grid: Grid, fresh: Callable | None):
    """Quantizes blocks of columns in order; each is followed by one update of the whole matrix with its stacked errors.

    `fresh(block) -> (scale, zero)` makes every block a group with a grid of its own.
    """
    n, k = w.shape
    block = grid.group_size if fresh else min(_BLOCK, k)
    pad = -k % block
    w = jnp.pad(w, ((0, 0), (0, pad)))
    u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(k + pad) >= k).astype(u.dtype))
    kept = (w != 0).reshape(n, -1, block).transpose(1, 0, 2)
    starts = jnp.arange(0, k + pad, block)
    xs = (u.reshape(len(starts), block, -1), kept, jnp.pad(groups, (0, pad)).reshape(-1, block), starts)

    def step(carry, x):
        w, scale, zero = carry
        rows, kept, groups, start = x
        part = lax.dynamic_slice_in_dim(w, start, block, 1)
        if fresh is not None:
            new = fresh(jnp.where(kept, part, 0.0))
            scale, zero = (
                lax.dynamic_update_slice_in_dim(a, b, groups[0], 1) for a, b in zip((scale, zero), new, strict=True)
            )
        factor = lax.dynamic_slice_in_dim(rows, start, block, 1)
        values, errors = _quantize_block(part, kept, factor, scale, zero, groups, grid)
        return (w - jnp.matmul(errors, rows, precision=lax.Precision.HIGHEST), scale, zero), values

    (_, scale, zero), values = lax.scan(step, (w, scale, zero), xs)
    return values.transpose(1, 0, 2).reshape(n, -1)[:, :k], scale, zero


def _quantize_block(
    w: Float[Array, "n c"], kept, u: Float[Array, "c c"], scale, zero, groups: Int[Array, "c"], grid: Grid
):
    """Values and scaled errors of one block, both [N, C]."""

    def column(j, state):
        w, values, errors = state
        x, keep = (lax.dynamic_slice_in_dim(a, j, 1, 1) for a in (w, kept))
        s, z = (lax.dynamic_slice_in_dim(a, groups[j], 1, 1) for a in (scale, zero))
        q = jnp.where(keep, decode(encode(x, s, z, grid), s, z), 0.0)
        e = (x - q) / u[j, j]
        put = lambda a, v: lax.dynamic_update_slice_in_dim(a, v, j, 1)
        return w - e * u[j][None], put(values, q), put(errors, e)

    zeros = jnp.zeros_like(w)
    _, values, errors = lax.fori_loop(0, w.shape[1], column, (w, zeros, zeros))
    return values, errors


@functools.partial(jax.jit, static_argnames=("act_order", "static_groups", "scale_dtype"))
def _quantize(w, gram, count, grid, damp, **options):
    """`quantize_matrix` with H = 2/T X^T X, over leading batch axes."""
    fn = lambda w, gram, count: quantize_matrix(w, 2 * gram / count, grid, damp=damp, **options)
    return over_batch(fn, w.ndim - 2)(w, gram, count)


_dense = jax.jit(QuantizedArray.materialise)


def gptq(
    bits: int = 4,
    *,
    rules: Sequence[Rule] = KERNELS,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    sequential: bool = True,
    **scheme: Any,
) -> Transform:
    """GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323, Algorithm 1): second-order rounding of weights.

    Pruned weights stay zero. Approximation: `sequential` statistics see the compressed weights of earlier blocks, but not their
    quantized activations.
    Weights without a Gram matrix (grouped convolutions) are rounded to nearest, with a warning that names them.

    Args:
      bits: weight bits, 1..8.
      rules: which leaves, and options per leaf.
      damp: share of the mean of diag(H) that is added to its diagonal.
      act_order: columns by descending diag(H); group scales are then static, since stored groups are neighbouring columns.
      static_groups: group scales from the original weights.
      sequential: recompute the statistics block by block (`blocks_0`, `blocks_1`, ...), each time from the compressed prefix.
        Stacked layers of a scan are one block.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`.

    Raises:
      ValueError: no calibration data; H is not positive definite (the message names the weight).
    """
    options = {"act_order": act_order, "static_groups": static_groups}

    def update(params: Any, stats: Any) -> Any:
        need_data(stats, "gptq")
        chosen = targets(params, rules, {"bits": bits, **scheme}, stats)
        new: dict[str, QuantizedArray] = {}
        prefix = params
        for stage in _stages(chosen, sequential):
            measured = stats(prefix, {"gram", "count"}, only=_observed(chosen, stage).__contains__)
            done = {t.path: _quantize_target(t, measured.get(t.path, {}), damp, options) for t in stage}
            prefix = replace_leaves(prefix, {path: _dense(leaf) for path, leaf in done.items()})
            new |= done
        return replace_leaves(params, new)

    return stateless(update)


def _quantize_target(
    t: Target, measured: Mapping[str, Any], damp: float, options: Mapping[str, bool]
) -> QuantizedArray:
    if "gram" not in measured:
        warnings.warn(f"{t.path}: no Gram matrix of its inputs; gptq rounds it to nearest", stacklevel=2)
        return t.rounded()
    batch = t.matrix.shape[:-2]
    count = jnp.broadcast_to(measured["count"], batch)
    values, scale, zero = _quantize(
        t.matrix, measured["gram"], count, t.scheme.grid, damp, scale_dtype=t.scheme.scale_dtype, **options
    )
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"{t.path}: the Hessian of its inputs is not positive definite with damp={damp}; raise damp")
    return t.encode(values, scale, zero)


def _stages(chosen: Sequence[Target], sequential: bool) -> Iterator[list[Target]]:
    """Consecutive targets of one block: paths that agree up to their first numbered segment (`blocks_3`, `layers/3`)."""
    block = lambda t: m[0] if sequential and (m := re.match(r"(?:[^/]*/)*?[^/]*\d(?=/)", t.path)) else ""
    return (list(group) for _, group in itertools.groupby(chosen, key=block))


def _observed(chosen: Sequence[Target], stage: Sequence[Target]) -> set[str]:
    """Paths whose Gram matrices a pass collects: those of all stages while they are small, so that one compilation serves all."""
    return {t.path for t in (chosen if sum(t.gram_bytes for t in chosen) <= GRAM_BYTES else stage)}
