"""AWQ: scales salient input channels up before rounding, then clips the ranges of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.core.leaf import replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, chain, stateless
from jaxcomp.formats import Grid, QuantizedArray
from jaxcomp.formats.grid import fake_quantize, qparams
from jaxcomp.quantize.pairs import LINEAR, LLAMA, Bound, Pair, bind, measure, rescale
from jaxcomp.quantize.scheme import KERNELS, Target, in_passes, need_data, over_batch, targets

_STEPS = 20  # points of both searches
QUERY_KEY = (Rule("re:(.*/)?(q|k|query|key)/kernel(/value)?"),)


def channel_scale(mean_abs: Float[Array, "k"], rho: float | Array) -> Float[Array, "k"]:
    """s_j = mean|X_j|^rho, at least 1e-4, normalised to sqrt(max s * min s) = 1."""
    s = jnp.maximum(mean_abs**rho, 1e-4)
    return s / jnp.sqrt(s.max() * s.min())


def output_error(d: Float[Array, "n k"], gram: Float[Array, "k k"]) -> Float[Array, ""]:
    """||X D^T||^2 = tr(D G D^T), exactly the squared change of a layer's output under a change D of its weights."""
    return jnp.sum(jnp.matmul(d, gram, precision=lax.Precision.HIGHEST) * d)


def search_scale(
    weights: Sequence[Float[Array, "n k"]],
    grids: Sequence[Grid],
    mean_abs: Float[Array, "k"],
    gram: Float[Array, "k k"],
) -> tuple[Float[Array, "k"], Float[Array, ""]]:
    """(s, rho) of the rho in {0, 1/20, ..., 19/20} with the least summed output error of W' = Q(W diag(s)) diag(s)^-1."""

    def error(rho):
        s = channel_scale(mean_abs, rho)[None]
        rounded = [
            fake_quantize(w * s, *qparams(w * s, grid), grid) / s for w, grid in zip(weights, grids, strict=True)
        ]
        return sum(output_error(w - q, gram) for w, q in zip(weights, rounded, strict=True))

    rhos = jnp.arange(_STEPS, dtype=jnp.float32) / _STEPS
    rho = rhos[jnp.argmin(lax.map(error, rhos))]
    return channel_scale(mean_abs, rho), rho


def search_clip(w: Float[Array, "n k"], grid: Grid, gram: Float[Array, "k k"]) -> Float[Array, "n k"]:
    """W clipped to +-max|w| (1 - i/20), per row and group the i in 0..9 with the least ||X_g (w - Q(clip(w)))||^2."""
    n, k = w.shape
    groups = grid.groups(k)
    grouped = w.reshape(n, groups, -1)
    blocks = gram.reshape(groups, k // groups, groups, k // groups)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)  # [G, k/G, k/G], X_g^T X_g
    bound = jnp.abs(grouped).max(-1, keepdims=True)

    def clipped(shrink):
        return jnp.clip(grouped, -bound * shrink, bound * shrink)

    def error(shrink):
        c = clipped(shrink).reshape(n, k)
        d = (w - fake_quantize(c, *qparams(c, grid), grid)).reshape(grouped.shape)
        return jnp.einsum("ngi,gij,ngj->ng", d, blocks, d, precision=lax.Precision.HIGHEST)

    shrinks = 1 - jnp.arange(_STEPS // 2, dtype=jnp.float32) / _STEPS
    best = shrinks[jnp.argmin(lax.map(error, shrinks), axis=0)]
    return clipped(best[..., None]).reshape(n, k)


@jax.jit
def _search_scale(weights, grids, mean_abs, gram):
    search = lambda weights, mean_abs, gram: search_scale(weights, grids, mean_abs, gram)[0]
    return over_batch(search, gram.ndim - 2)(weights, mean_abs, gram)


@jax.jit
def _search_clip(w, grid, gram):
    return over_batch(lambda w, gram: search_clip(w, grid, gram), w.ndim - 2)(w, gram)


def awq_scale(
    bits: int = 4,
    *,
    pairs: Sequence[Pair] = LLAMA + LINEAR,
    rules: Sequence[Rule] = KERNELS,
    group_size: int = 128,
    symmetric: bool = False,
    **scheme: Any,
) -> Transform:
    """The scaling half of `awq`; rescales only, so that another quantizer may follow: `chain(awq_scale(4), gptq(4, ...))`.

    Every pair with a consumer that is to be quantized is rescaled, its other consumers with it. Arguments and errors: see `awq`.
    """
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, **scheme}

    def update(params: Any, stats: Any) -> Any:
        need_data(stats, "awq")
        chosen = {t.path: t for t in targets(params, rules, options, stats)}
        places = [p for p in bind(params, pairs, stats) if any(t.path in chosen for t in p.consumers)]
        scales = []
        for some in in_passes(places, lambda place: place.consumers[0]):
            measured = measure(stats, params, some, {"count", "sum_abs", "gram"})
            scales += [_scale_of(place, chosen, inputs) for place, inputs in zip(some, measured, strict=True)]
        return rescale(params, places, scales, stats)

    return stateless(update)


def awq_clip(
    bits: int = 4,
    *,
    rules: Sequence[Rule] = KERNELS,
    unclipped: Sequence[Rule] = QUERY_KEY,
    group_size: int = 128,
    symmetric: bool = False,
    **scheme: Any,
) -> Transform:
    """The rounding half of `awq`: clips ranges by search, then rounds to nearest. Arguments and errors: see `awq`."""
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, **scheme}

    def update(params: Any, stats: Any) -> Any:
        need_data(stats, "awq")
        chosen = targets(params, rules, options, stats)
        free = lambda t: t.scheme.group_size == -1 or any(rule.matches(t.path) for rule in unclipped)
        new = {t.path: t.rounded() for t in chosen if free(t)}
        for some in in_passes([t for t in chosen if not free(t)], lambda t: t):
            measured = stats(params, {"gram"}, only={t.path for t in some}.__contains__)
            new |= {t.path: _clipped(t, measured.get(t.path, {})) for t in some}
        return replace_leaves(params, new)

    return stateless(update)


def awq(
    bits: int = 4,
    *,
    pairs: Sequence[Pair] = LLAMA + LINEAR,
    rules: Sequence[Rule] = KERNELS,
    unclipped: Sequence[Rule] = QUERY_KEY,
    group_size: int = 128,
    symmetric: bool = False,
    **scheme: Any,
) -> Transform:
    """AWQ (Lin et al., MLSys 2024, arXiv 2306.00978, eq. 4-5): activation-aware scaling, clipping and rounding of weights.

    Departures: the authors choose rho by the output of the whole attention or MLP block, here by the summed output error of
    the layers that read the input, by its Gram matrix, exact over all calibration tokens. They clip on about 512 tokens, here on
    all. Per-tensor grids (`group_size=-1`) and weights without a Gram matrix (grouped convolutions) are rounded without clipping.

    Args:
      bits: weight bits, 1..8.
      pairs: what feeds which weights; `GEMMA + LINEAR` for gains of 1 + scale, your own for other models.
      rules: which leaves, and options per leaf.
      unclipped: leaves whose ranges are kept; queries and keys by default, as the authors do.
      group_size: inputs that share a scale.
      symmetric: symmetric weight grid.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`.

    Raises:
      ValueError: no calibration data; the pairs do not fit the model (see `jaxcomp.quantize.pairs`).
    """
    shared = dict(rules=rules, group_size=group_size, symmetric=symmetric, **scheme)
    return chain(awq_scale(bits, pairs=pairs, **shared), awq_clip(bits, unclipped=unclipped, **shared))


def _scale_of(place: Bound, chosen: Mapping[str, Target], measured: Mapping[str, jax.Array]) -> Float[Array, "*b k"]:
    rounded = [chosen[t.path] for t in place.consumers if t.path in chosen]
    mean_abs = measured["sum_abs"] / measured["count"][..., None]
    return _search_scale([t.matrix for t in rounded], [t.scheme.grid for t in rounded], mean_abs, measured["gram"])


def _clipped(t: Target, measured: Mapping[str, jax.Array]) -> QuantizedArray:
    if "gram" not in measured:
        return t.rounded()
    return t.rounded(_search_clip(t.matrix, t.scheme.grid, measured["gram"]))
