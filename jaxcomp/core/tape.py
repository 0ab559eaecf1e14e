"""What rules say while a compressed model is traced: events for `explain`, statistics for `calibrate`.

A tape is open only inside `recording()`. Events are static facts (which leaf, which primitive, which kernel). Statistics
are arrays of the trace in progress, so every rule of a higher-order primitive (`jaxcomp.core.higher_order`) opens a tape of its
own inside the body and hands the statistics out as outputs of that body: nothing leaks from `scan`, `remat` or `cond`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

MATERIALISED = "materialised"

Stats = dict[str, dict[str, jax.Array]]  # {leaf path: {statistic: array}}


class Event(NamedTuple):
    """A compressed leaf met a primitive and a kernel (or `materialised`) answered."""

    leaf: str
    primitive: str
    kernel: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()  # contracted axes of the stored leaf, where a rule knows them


@dataclasses.dataclass
class Tape:
    """Events in trace order and statistics by leaf name."""

    events: list[Event] = dataclasses.field(default_factory=list)
    stats: Stats = dataclasses.field(default_factory=dict)


_CURRENT: contextvars.ContextVar[Tape | None] = contextvars.ContextVar("jaxcomp_tape", default=None)


@contextlib.contextmanager
def recording():
    """Opens a fresh tape for the block; events also reach no outer tape (see `merge`)."""
    tape = Tape()
    token = _CURRENT.set(tape)
    try:
        yield tape
    finally:
        _CURRENT.reset(token)


def is_open() -> bool:
    """True inside `recording()`."""
    return _CURRENT.get() is not None


def event(leaf: str, primitive: str, kernel: str, shape: tuple[int, ...], axes: tuple[int, ...] = ()) -> None:
    """Records one event if a tape is open."""
    if (tape := _CURRENT.get()) is not None:
        tape.events.append(Event(leaf, primitive, kernel, tuple(shape), axes))


def add_stats(leaf: str, stats: dict[str, jax.Array]) -> None:
    """Merges statistics of one use of a leaf into the open tape (no-op when none is open)."""
    if (tape := _CURRENT.get()) is not None:
        tape.stats[leaf] = merge_leaf(tape.stats[leaf], stats) if leaf in tape.stats else dict(stats)


def absorb(events: list[Event], stats: Stats) -> None:
    """Hands what an inner tape recorded to the open one."""
    if (tape := _CURRENT.get()) is not None:
        tape.events.extend(events)
        for leaf, value in stats.items():
            add_stats(leaf, value)


def reduction(statistic: str):
    """How a statistic merges: `max_*` by maximum, `min_*` by minimum, everything else by `+`."""
    return {"max": jnp.maximum, "min": jnp.minimum}.get(statistic.split("_")[0], jnp.add)


def merge_leaf(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Merges the statistics of two uses, batches or shards of one leaf."""
    return {k: reduction(k)(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}


def merge(a: Stats, b: Stats) -> Stats:
    """Merges two statistics trees leaf by leaf."""
    return {p: merge_leaf(a.get(p, {}), b.get(p, {})) for p in {**a, **b}}


def reduce_leading(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Merges along the leading axis: the uses of one leaf by all iterations of a scan."""
    fold = {"max": jnp.max, "min": jnp.min}
    return {k: fold.get(k.split("_")[0], jnp.sum)(v, axis=0) for k, v in stats.items()}
