"""Calibration: statistics of what every weight is multiplied with, on demand, for the model as it stands."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core import progress, tape
from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, map_leaves
from jaxcomp.formats.observed import ObservedArray


class Usage(NamedTuple):
    """How a model uses a leaf: `axes` are the contracted ones, negative, so that leading scanned axes do not shift them."""

    axes: tuple[int, ...]
    batch_ndim: int
    primitive: str


class Calibration:
    """Runs a model on calibration batches and answers `calibration(params, needs)`.

    Statistics are sums (maxima for `max_*`) over all batches, float32, computed in one jitted pass that works through `scan` over
    layers (they come stacked), `remat` and inner `jit`; with batches sharded over a mesh XLA reduces them over the shards.

    Attributes:
      apply: `apply(params, batch) -> outputs`, not yet `compressed`.
      batches: the calibration batches, each a pytree of arrays of equal shapes.
    """

    def __init__(self, apply: Callable[[Any, Any], Any], batches: Iterable[Any]):
        self.apply, self.batches = apply, list(batches)
        if not self.batches:
            raise ValueError("no calibration batches; give at least one")

    def __call__(
        self, params: Any, needs: Iterable[str], only: Callable[[str], bool] | None = None
    ) -> dict[str, dict[str, jax.Array]]:
        """Statistics `{path: {name: array}}` of the current `params` (names: `jaxcomp.formats.observed.STATISTICS`).

        Args:
          params: the tree, compressed or not.
          needs: statistics to collect.
          only: restricts collection to paths for which it is true (Gram matrices are large).

        Raises:
          ValueError: the statistics of a leaf are not finite; the message names it.
        """
        needs = tuple(sorted(needs))
        wanted = {p for p in _observable(params) if only is None or only(p)}
        observed = map_leaves(lambda p, x: ObservedArray.of(x, needs, p) if p in wanted else x, params)
        total = None
        for batch in progress.track(self.batches, "calibrate"):
            stats = self._step(observed, batch)
            total = stats if total is None else _merge(total, stats)
        return _check_finite(total)

    def usage(self, params: Any) -> dict[str, Usage]:
        """How the model uses each leaf of two or more axes; nothing is computed. Leaves it only adds or scales are absent."""
        wanted = _observable(params)
        observed = map_leaves(lambda p, x: ObservedArray.of(x, (), p) if p in wanted else x, params)
        events = explain(self.apply, observed, self.batches[0]).events
        ndim = {p: len(x.shape) for p, x in leaves_with_paths(params).items()}
        out: dict[str, Usage] = {}
        for e in events:
            if not e.axes or e.leaf not in ndim:
                continue
            use = Usage(e.axes, ndim[e.leaf] - len(e.shape), e.primitive)
            if (seen := out.get(e.leaf)) and seen.axes != use.axes:
                raise ValueError(
                    f"{e.leaf}: contracted over axes {seen.axes} and over {use.axes}; exclude it by a rule"
                )
            if e.leaf not in out or e.primitive != "gather":
                out[e.leaf] = use
        return out

    @functools.cached_property
    def _step(self) -> Callable:
        def step(observed, batch):
            with tape.recording() as recorded:
                compressed(self.apply)(observed, batch)
            return recorded.stats

        return jax.jit(step)


def _observable(params: Any) -> set[str]:
    def ok(x):
        return len(x.shape) >= 2 and (is_compressed(x) or jnp.issubdtype(x.dtype, jnp.floating))

    return {p for p, x in leaves_with_paths(params).items() if ok(x)}


_merge = jax.jit(tape.merge)


def _check_finite(stats: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    for path, leaf in stats.items():
        for name, value in leaf.items():
            if not bool(jnp.isfinite(value).all()):
                raise ValueError(
                    f"{path}: calibration statistic {name!r} is not finite; look for NaN or Inf in the weights before it, "
                    "or in the calibration batches"
                )
    return {p: dict(s) for p, s in stats.items()}


def block_order(paths: Sequence[str]) -> list[list[str]]:
    """Groups paths by first segment in natural order (`blocks_2` before `blocks_10`): the order of sequential methods."""
    natural = lambda s: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", s)]
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.split("/")[0], []).append(path)
    return [groups[k] for k in sorted(groups, key=natural)]
