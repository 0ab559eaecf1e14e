"""Cache policies: when to run the trunk (`Decision`) and what to keep for the steps that do not (`Store`).

A policy's state is a pytree of fixed shapes in the carry of the sampling loop. It starts as zeros; step 0 always computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxcomp.sampling.denoiser import module_outputs

Run = Callable[..., Any]  # run(h, c, around=call) -> h', the trunk with its params


class CachePolicy(NamedTuple):
    """What a sampler does in place of running its trunk at every step.

    Attributes:
      plan: `plan(T)`: bool [T], True where the trunk runs, or None if that is decided while sampling.
      init: `init(run, h, c)`: a pytree whose shapes and dtypes are those of the state; only ever evaluated abstractly.
      decide: `decide(state, h, c, i) -> (bool [], state)`: one for the whole batch; called at every step if `plan` is None.
      compute: `compute(state, run, h, c, i) -> (h', state)`: a step that runs the trunk.
      reuse: `reuse(state, run, h, c, i) -> (h', state)`: a step that does not, or runs parts of it.
    """

    plan: Callable[[int], Bool[np.ndarray, "T"] | None]
    init: Callable[[Run, Any, Any], Any]
    decide: Callable[[Any, Any, Any, Any], tuple[Bool[Array, ""], Any]]
    compute: Callable[[Any, Run, Any, Any, Any], tuple[Any, Any]]
    reuse: Callable[[Any, Run, Any, Any, Any], tuple[Any, Any]]


class Decision(NamedTuple):
    """When to run the trunk.

    Attributes:
      plan: as in `CachePolicy`.
      init: `init(h, c) -> state`.
      decide: as in `CachePolicy`, on this state.
      observe: `observe(state, h, c, kept, i) -> state`: sees the store after a step that ran the trunk.
    """

    plan: Callable[[int], Bool[np.ndarray, "T"] | None]
    init: Callable[[Any, Any], Any] = lambda h, c: ()
    decide: Callable[[Any, Any, Any, Any], tuple[Bool[Array, ""], Any]] = lambda state, h, c, i: (
        jnp.array(True),
        state,
    )
    observe: Callable[[Any, Any, Any, Any, Any], Any] = lambda state, h, c, kept, i: state


class Store(NamedTuple):
    """What is kept of a step that ran the trunk, and how it stands in for one that does not; signatures as in `CachePolicy`."""

    init: Callable[[Run, Any, Any], Any]
    compute: Callable[[Any, Run, Any, Any, Any], tuple[Any, Any]]
    reuse: Callable[[Any, Run, Any, Any, Any], tuple[Any, Any]]


class Cached(NamedTuple):
    """State of a policy made by `cached`."""

    decision: Any
    kept: Any


def cached(decision: Decision, store: Store) -> CachePolicy:
    """The policy that keeps what `store` keeps and runs the trunk when `decision` says."""

    def init(run, h, c):
        kept = store.init(run, h, c)
        return Cached(decision.init(h, c), kept)

    def decide(state, h, c, i):
        run_trunk, new = decision.decide(state.decision, h, c, i)
        return run_trunk, state._replace(decision=new)

    def compute(state, run, h, c, i):
        new, kept = store.compute(state.kept, run, h, c, i)
        return new, Cached(decision.observe(state.decision, h, c, kept, i), kept)

    def reuse(state, run, h, c, i):
        h, kept = store.reuse(state.kept, run, h, c, i)
        return h, state._replace(kept=kept)

    return CachePolicy(decision.plan, init, decide, compute, reuse)


def planned(mask: Sequence[bool] | Callable[[int], Any]) -> Decision:
    """The decision that is known beforehand: a mask, or a function of the number of steps that returns one."""
    return Decision(mask if callable(mask) else lambda steps: mask)


def nothing() -> Store:
    """Keeps nothing: for plans that run the trunk at every step."""

    def reuse(kept, run, h, c, i):
        raise ValueError("a plan skips a step, but nothing is kept to reuse; give the policy another store")

    return Store(lambda run, h, c: (), lambda kept, run, h, c, i: (run(h, c), kept), reuse)


def uncached() -> CachePolicy:
    """Runs the trunk at every step."""
    return cached(planned(lambda steps: np.ones(steps, bool)), nothing())


def residual(opposed: bool = False) -> Store:
    """Keeps R = h' - h, one tensor shaped as h; a skipped step returns h + R. `opposed`: R = h' + h, and R - h."""
    minus, plus = (jnp.add, jnp.subtract) if opposed else (jnp.subtract, jnp.add)

    def compute(kept, run, h, c, i):
        new = run(h, c)
        return new, jax.tree.map(minus, new, h)

    return Store(lambda run, h, c: h, compute, lambda kept, run, h, c, i: (jax.tree.map(plus, kept, h), kept))


def output() -> Store:
    """Keeps h' itself; a skipped step returns it."""

    def compute(kept, run, h, c, i):
        new = run(h, c)
        return new, new

    return Store(lambda run, h, c: h, compute, lambda kept, run, h, c, i: (kept, kept))


def modules(pattern: str) -> Store:
    """Keeps the outputs of the modules whose whole name matches a regular expression; a skipped step runs all the others.

    Raises:
      ValueError: no module of the trunk matches (when sampled).
    """

    def compute(kept, run, h, c, i):
        return module_outputs(lambda around: run(h, c, around), pattern)

    def reuse(kept, run, h, c, i):
        return run(h, c, lambda name, fn, h: kept[name] if name in kept else fn(h)), kept

    return Store(lambda run, h, c: compute((), run, h, c, 0)[1], compute, reuse)


def frozen(policy: CachePolicy, mask: Sequence[bool]) -> CachePolicy:
    """The same cache with a mask recorded beforehand (say `Trace.mask` of a calibration run) in place of its decisions."""
    mask = np.asarray(mask, bool)
    return policy._replace(plan=lambda steps: mask)


def either(flag: Any, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any) -> Any:
    """`yes(*operands)` or `no(*operands)`: chosen while tracing if the flag is known then, by `lax.cond` otherwise."""
    if isinstance(flag, bool | np.bool_):
        return (yes if flag else no)(*operands)
    return jax.lax.cond(flag, yes, no, *operands)


def at_step(table: np.ndarray, i: Any) -> Any:
    """Entry i of a table: a numpy scalar if the step is known while tracing, an array otherwise."""
    return table[i] if isinstance(i, int) else jnp.asarray(table)[i]


def matches(pattern: str, name: str) -> bool:
    """Whether the whole name of a module matches."""
    return re.fullmatch(pattern, name) is not None
