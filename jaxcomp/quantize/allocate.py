"""Budgeted mixed precision: how many bits every kernel gets so that a tree fits a number of bytes and loses least."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.core import progress
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import leaves_with_paths, nbytes, replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.formats import QuantizedArray
from jaxcomp.quantize.scheme import KERNELS, Target, need_data, targets

WIDTHS = tuple({"bits": bits} for bits in (2, 3, 4, 5, 6, 8))
_UNITS = 1 << 18  # of the budget that the dynamic programme tells apart
_SHARED = ((r"/attn/[qkv]/", "/attn/qkv/"), (r"/mlp/(?:gate|up)/", "/mlp/gate_up/"))


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What each choice costs and weighs, for each group of leaves that are given one choice.

    Attributes:
      groups: paths of the leaves of every group.
      choices: options of a `Rule`, say {"bits": 3}.
      cost: KL(p_float || p) in nats per token with this group alone rounded.
      bytes: of the group's leaves, scales and zero points included.
      rest: bytes of all other leaves of the tree.
    """

    groups: Mapping[str, tuple[str, ...]]
    choices: tuple[Mapping[str, Any], ...]
    cost: Float[np.ndarray, "groups choices"]
    bytes: Int[np.ndarray, "groups choices"]
    rest: int

    @property
    def smallest(self) -> int:
        """Bytes of the smallest tree that these choices reach."""
        return self.rest + int(self.bytes.min(1).sum())


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A choice for every group.

    Attributes:
      options: by path of a leaf.
      cost: sum of the groups' costs, nats per token.
      bound: no allocation within the budget costs less (Lagrangian dual); `cost - bound` certifies how near to optimal this is.
      bytes: of the whole tree.
    """

    options: Mapping[str, Mapping[str, Any]]
    cost: float
    bound: float
    bytes: int

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One rule per leaf, for the `rules` of any quantizer."""
        return tuple(Rule(path, **options) for path, options in self.options.items())


def shared_call(path: str) -> str:
    """The group of a decoder's kernel: q, k, v, which servers multiply in one call, gate and up, or the kernel by itself."""
    return functools.reduce(lambda name, rule: re.sub(*rule, name), _SHARED, path)


def measure(
    params: Any,
    stats: Calibration,
    rules: Sequence[Rule] = KERNELS,
    choices: Sequence[Mapping[str, Any]] = WIDTHS,
    *,
    group: Callable[[str], str] = shared_call,
    rounded: Callable[[Target], QuantizedArray] = Target.rounded,
    **scheme: Any,
) -> Sensitivity:
    """Sensitivity of a model's outputs (logits, over the last axis) to the rounding of each group alone, all else in float.

    Costs add up only approximately, and activations stay in floating point. One forward pass per batch, group and choice.

    Args:
      params: dense tree. Stacked layers of a scan get one choice for all layers; unstack them first.
      stats: model and calibration batches.
      rules: which leaves.
      choices: options that compete, fields of `jaxcomp.quantize.scheme.Scheme`.
      group: name of the group that a path belongs to.
      rounded: how a leaf is rounded; to nearest by default.
      **scheme: further fields of `Scheme`, as the quantizer will have them: they decide the bytes.

    Raises:
      ValueError: no calibration data; a rule or option is wrong, see `jaxcomp.quantize.scheme.targets`.
    """
    need_data(stats, "measure")
    by_choice = [targets(params, rules, scheme | dict(choice), stats) for choice in choices]
    if len({len(found) for found in by_choice}) > 1:
        raise ValueError(f"choices must all round the same leaves; leave 16 bits out of {[dict(c) for c in choices]}")
    groups: dict[str, list[int]] = {}
    for i, target in enumerate(by_choice[0]):
        groups.setdefault(group(target.path), []).append(i)
    grid = [[[found[i] for i in members] for found in by_choice] for members in groups.values()]
    cost, size = _costs(params, stats, grid, rounded)
    paths = {name: tuple(by_choice[0][i].path for i in members) for name, members in groups.items()}
    chosen = {path for members in paths.values() for path in members}
    rest = nbytes({path: leaf for path, leaf in leaves_with_paths(params).items() if path not in chosen})
    return Sensitivity(paths, tuple(map(dict, choices)), cost, size, rest)


def _costs(params: Any, stats: Calibration, grid: Sequence[Sequence[Sequence[Target]]], rounded: Callable):
    """(cost, bytes), each [groups, choices], of the targets [groups][choices][leaves]."""
    shape = len(grid), len(grid[0])
    cost, size = np.zeros(shape), np.zeros(shape, np.int64)
    for batch in progress.track(stats.batches, "sensitivity"):
        want = jax.jit(stats.apply)(params, batch)
        for at in np.ndindex(shape):
            leaves = {t.path: rounded(t) for t in grid[at[0]][at[1]]}
            size[at] = sum(leaf.nbytes for leaf in leaves.values())
            dense = replace_leaves(params, {path: _dense(leaf) for path, leaf in leaves.items()})
            cost[at] += float(_divergence(stats.apply, dense, batch, want)) / len(stats.batches)
    return cost, size


def allocate(sensitivity: Sensitivity, budget: int) -> Allocation:
    """The choices of least total cost whose tree has at most `budget` bytes.

    A multiple-choice knapsack by dynamic programming over bytes: exact while the budget has at most 2^18 units of the sizes'
    greatest common divisor. In larger trees sizes are rounded up to coarser units; `Allocation.bound` says what that can cost.

    Raises:
      ValueError: the budget is below the smallest tree that the choices reach (the message names it).
    """
    room = budget - sensitivity.smallest
    if room < 0:
        raise ValueError(
            f"budget of {budget:,} bytes: the smallest tree has {sensitivity.smallest:,} bytes, "
            f"{sensitivity.rest:,} of them untouched; raise the budget, offer fewer bits, or let rules select more leaves"
        )
    extra = sensitivity.bytes - sensitivity.bytes.min(1, keepdims=True)
    chosen = _knapsack(sensitivity.cost, extra, min(room, int(extra.max(1).sum())))
    rows = np.arange(len(chosen))
    options = {
        path: sensitivity.choices[c]
        for paths, c in zip(sensitivity.groups.values(), chosen, strict=True)
        for path in paths
    }
    size = sensitivity.rest + int(sensitivity.bytes[rows, chosen].sum())
    cost = float(sensitivity.cost[rows, chosen].sum())
    return Allocation(options, cost, min(cost, _dual(sensitivity.cost, extra, room)), size)


def _knapsack(cost: Float[np.ndarray, "g c"], extra: Int[np.ndarray, "g c"], room: int) -> Int[np.ndarray, "g"]:
    """The choice of each group: least sum of costs with a sum of extras within the room."""
    unit = max(math.gcd(*extra.ravel().tolist()), 1)
    unit *= -(-max(room // unit, 1) // _UNITS)
    sizes, capacity = -(-extra // unit), room // unit
    best = np.zeros(capacity + 1)  # least cost of the groups so far within so many units
    chosen = np.empty((len(cost), capacity + 1), np.int8)
    for g in range(len(cost)):
        tried = np.full((cost.shape[1], capacity + 1), np.inf)
        for c, size in enumerate(sizes[g]):
            if size <= capacity:
                tried[c, size:] = best[: capacity + 1 - size] + cost[g, c]
        chosen[g] = tried.argmin(0)
        best = tried.min(0)
    out, left = np.empty(len(cost), int), capacity
    for g in reversed(range(len(cost))):
        out[g] = chosen[g, left]
        left -= sizes[g, out[g]]
    return out


def _dual(cost: Float[np.ndarray, "g c"], extra: Int[np.ndarray, "g c"], room: int) -> float:
    """max over prices p >= 0 of sum_g min_c (cost + p extra) - p room: concave, piecewise linear, so at a corner."""
    gain = cost[:, :, None] - cost[:, None]
    weight = extra[:, None] - extra[:, :, None]
    prices = np.unique(np.append(gain[(gain > 0) & (weight > 0)] / weight[(gain > 0) & (weight > 0)], 0.0))
    return max(float((cost + p * extra).min(1).sum() - p * room) for p in prices)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(apply: Callable, params: Any, batch: Any, want: Float[Array, "*b v"]) -> Float[Array, ""]:
    """KL(softmax(want) || softmax(apply)), mean over all but the last axis."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (want, apply(params, batch)))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


_dense = jax.jit(QuantizedArray.materialise)
