"""Run an unmodified model on a compressed tree (`compressed`), and see what each leaf met on the way (`explain`)."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import quax
from rich.console import Console
from rich.table import Table

from jaxcomp._compat import complete_quax
from jaxcomp.core import higher_order as _higher_order  # noqa: F401  (registers its rules)
from jaxcomp.core import tape
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, named

complete_quax()


def compressed(fn: Callable) -> Callable:
    """`fn` (say `model.apply`), made to accept compressed leaves wherever it accepts arrays.

    Pair it with `jax.jit`: `jax.jit(compressed(model.apply))(params, x)`. Works under and over `jit`, `vmap`, `grad`, `scan`,
    `remat` and meshes; flags among the arguments (`train=True`) stay what they are. A primitive without a rule for a leaf
    materialises that leaf; `explain` shows where.
    """

    @functools.wraps(fn)
    def run(*args, **kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_value)
        dynamic = {
            i: leaf for i, leaf in enumerate(leaves) if _is_value(leaf) or isinstance(leaf, jax.Array | np.ndarray)
        }
        structure = None

        def flat(dynamic):  # pytrees with state (NNX variables) are put together and taken apart under quax's own trace
            nonlocal structure
            args, kwargs = jax.tree.unflatten(treedef, [dynamic.get(i, leaf) for i, leaf in enumerate(leaves)])
            out, structure = jax.tree.flatten(fn(*args, **kwargs), is_leaf=_is_value)
            return out

        out = quax.quaxify(flat)(dynamic)
        return jax.tree.unflatten(structure, out)

    return run


def _is_value(x: Any) -> bool:
    return isinstance(x, quax.Value)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which kernel answered for which compressed leaf. `str()` is a table, one row per distinct event."""

    events: tuple[tape.Event, ...]
    leaves: tuple[str, ...]

    @property
    def materialised(self) -> tuple[tape.Event, ...]:
        """The events in which a leaf was expanded to a dense array because a primitive had no rule for it."""
        return tuple(e for e in self.events if e.kernel == tape.MATERIALISED)

    @property
    def unused(self) -> tuple[str, ...]:
        """Compressed leaves that met no primitive at all."""
        return tuple(sorted(set(self.leaves) - {e.leaf for e in self.events}))

    def kernels(self, leaf: str) -> tuple[str, ...]:
        """The kernels that consumed one leaf, in trace order."""
        return tuple(e.kernel for e in self.events if e.leaf == leaf)

    def __str__(self) -> str:
        table = Table("leaf", "primitive", "kernel", "shape", title="compressed leaves")
        for e in dict.fromkeys(self.events):
            table.add_row(e.leaf, e.primitive, e.kernel, "x".join(map(str, e.shape)))
        for leaf in self.unused:
            table.add_row(leaf, "-", "unused", "")
        console = Console(width=150, markup=False, file=io.StringIO())
        console.print(table)
        return console.file.getvalue()


def explain(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Traces `fn(params, *args, **kwargs)` (nothing is computed) and lists what consumed every compressed leaf.

    Args:
      fn: the model's apply function, not yet `compressed`.
      params: a tree with compressed leaves.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: further keyword arguments of `fn`.
    """

    def fresh(*a, **k):  # a new function object: a cached trace would record nothing
        return compressed(fn)(*a, **k)

    with tape.recording() as recorded:
        jax.eval_shape(fresh, named(params), *args, **kwargs)
    paths = tuple(p for p, leaf in leaves_with_paths(params).items() if is_compressed(leaf))
    return Explanation(tuple(recorded.events), paths)


def shape_structs(tree: Any) -> Any:
    """Abstract arrays of a tree, for `explain` without data."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
