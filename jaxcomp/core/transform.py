"""The algebra: a compression method is a pair of pure functions on a param tree, and pairs compose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jaxcomp.core.leaf import CompressedArray, is_compressed, leaves_with_paths, map_leaves, materialise_tree
from jaxcomp.core.rules import Rule, resolve


class EmptyState(NamedTuple):
    """State of a transform that keeps none."""


class Transform(NamedTuple):
    """A compression method.

    Attributes:
      init: `init(params) -> state`.
      update: `update(params, state, stats) -> (params, state)`. `stats` is a `Calibration` (statistics of the model *as it is
        at this point of the chain*, on demand) or None for methods that need no data. Unchanged leaves are returned as they are.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def stateless(fn: Callable[[Any, Any], Any]) -> Transform:
    """A transform from `fn(params, stats) -> params`."""
    return Transform(lambda params: EmptyState(), lambda params, state, stats: (fn(params, stats), state))


def identity() -> Transform:
    """Changes nothing."""
    return stateless(lambda params, stats: params)


def named_chain(*steps: tuple[str, Transform]) -> Transform:
    """Applies transforms in order; the state is `{name: state}`. The order is the compression pipeline.

    Raises:
      ValueError: two steps share a name.
    """
    names = [name for name, _ in steps]
    if len(set(names)) != len(names):
        raise ValueError(f"names of a chain must differ, got {names}")

    def init(params):
        return {name: step.init(params) for name, step in steps}

    def update(params, state, stats):
        new = {}
        for name, step in steps:
            params, new[name] = step.update(params, state[name], stats)
        return params, new

    return Transform(init, update)


def chain(*transforms: Transform) -> Transform:
    """`named_chain` with the positions as names."""
    return named_chain(*((str(i), t) for i, t in enumerate(transforms)))


class FrozenArray(CompressedArray):
    """A leaf that transforms must not touch: `masked` puts it around everything outside its rules, and takes it off again."""

    kind = "frozen"
    value: jax.Array
    name: str = eqx.field(static=True, default="")

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype of the value."""
        return jax.core.ShapedArray(self.value.shape, self.value.dtype)

    def materialise(self) -> jax.Array:
        """The value."""
        return self.value


def masked(transform: Transform, rules: Sequence[Rule]) -> Transform:
    """Shows `transform` only the leaves that `rules` select; all others pass through untouched."""

    def hide(params):
        keep = resolve(rules, leaves_with_paths(params))
        wrap = lambda path, leaf: leaf if path in keep or is_compressed(leaf) else FrozenArray(leaf)
        return map_leaves(wrap, params)

    def show(params):
        return map_leaves(lambda _, leaf: leaf.value if isinstance(leaf, FrozenArray) else leaf, params)

    def update(params, state, stats):
        params, state = transform.update(hide(params), state, stats)
        return show(params), state

    return Transform(lambda params: transform.init(hide(params)), update)


def compress(transform: Transform, params: Any, stats: Any = None) -> tuple[Any, Any, float]:
    """Runs a transform on a tree.

    Returns:
      (compressed params, state, seconds).

    Raises:
      ValueError: the tree is empty.
    """
    if not jax.tree.leaves(params):
        raise ValueError("params holds no arrays; pass the tree that the model's apply takes")
    start = time.perf_counter()
    params, state = transform.update(params, transform.init(params), stats)
    jax.block_until_ready(jax.tree.leaves(params))
    return params, state, time.perf_counter() - start


class WrapOptaxState(NamedTuple):
    """State of `wrap_optax`: the optimizer's, and the number of steps taken."""

    inner: Any
    count: jax.Array


def wrap_optax(
    optimizer: optax.GradientTransformation, transform: Transform, every: int = 1
) -> optax.GradientTransformation:
    """Projects the parameters through a data-free transform after each `every`-th optimizer step (masks, rounding).

    The transform's result is materialised, so that the parameters stay dense arrays: after a projecting step the params *are*
    the values of the compressed model. With `every > 1` the steps between are free (a mask schedule).

    Raises:
      ValueError: `every` < 1.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")

    def init(params):
        return WrapOptaxState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def project(params):
        return materialise_tree(transform.update(params, transform.init(params), None)[0])

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("wrap_optax needs the params: call update(grads, state, params)")
        updates, inner = optimizer.update(grads, state.inner, params)
        new = optax.apply_updates(params, updates)
        count = state.count + 1
        new = jax.lax.cond(count % every == 0, project, lambda p: p, new)
        return jax.tree.map(lambda a, b: a - b, new, params), WrapOptaxState(inner, count)

    return optax.GradientTransformation(init, update)
