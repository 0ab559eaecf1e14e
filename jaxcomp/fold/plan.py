"""Depth folding: blocks that share one set of leaves. A folded model is `(tree, plan)`.

The tree holds each distinct block once; the plan is static and hashable and says which block uses which. `unfold(tree, plan)`
only re-references leaves: under `jit` nothing is copied, and gradients of shared leaves add up by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaf import leaves_with_paths, path_str
from jaxcomp.core.transform import Transform


class FoldPlan(NamedTuple):
    """Which block uses which block's leaves.

    Attributes:
      prefix: name of the blocks without their index, say `blocks_`.
      source: for each block, the index of the block whose leaves it uses; `source[source[i]] == source[i]`.
    """

    prefix: str
    source: tuple[int, ...]

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Blocks that share leaves, in order of their first member."""
        return tuple(tuple(np.flatnonzero(np.array(self.source) == s).tolist()) for s in dict.fromkeys(self.source))


def contiguous_plan(num_blocks: int, group: int, prefix: str = "blocks_", keep: Sequence[int] = ()) -> FoldPlan:
    """Runs of `group` consecutive blocks share the leaves of their first block; blocks in `keep` stay on their own.

    Raises:
      ValueError: group outside 1..num_blocks, or `keep` names a block that is not there.
    """
    if not 1 <= group <= num_blocks:
        raise ValueError(f"group must be in 1..{num_blocks}, got {group}")
    if outside := [k for k in keep if not 0 <= k < num_blocks]:
        raise ValueError(f"keep names blocks {outside}, the model has {num_blocks}")
    source, run = [], []
    for i in range(num_blocks):
        if i in keep or len(run) == group or (run and run[-1] in keep):
            run = []
        run.append(i)
        source.append(run[0])
    return FoldPlan(prefix, tuple(source))


def fold(params: Any, plan: FoldPlan) -> Any:
    """Drops the blocks whose leaves another block provides. Every level of nested dicts may hold the blocks (`{"params": ...}`).

    Raises:
      ValueError: the tree has no blocks of that name, another number of them, or blocks that share differ in their shapes.
    """
    home, blocks = _find(params, plan.prefix)
    if len(blocks) != len(plan.source):
        raise ValueError(
            f"{home or 'tree'}: found {len(blocks)} blocks {plan.prefix}*, the plan has {len(plan.source)}"
        )
    for i, s in enumerate(plan.source):
        _check_same(blocks[i], blocks[s], f"{plan.prefix}{i}", f"{plan.prefix}{s}")
    dropped = {f"{plan.prefix}{i}" for i, s in enumerate(plan.source) if s != i}
    return _edit(params, home, lambda node: {k: v for k, v in node.items() if k not in dropped})


def unfold(tree: Any, plan: FoldPlan) -> Any:
    """The tree that the model's apply expects: shared blocks reference the leaves of their source."""
    home, _ = _find(tree, plan.prefix)
    shared = lambda node: {f"{plan.prefix}{i}": node[f"{plan.prefix}{s}"] for i, s in enumerate(plan.source)}
    return _edit(tree, home, lambda node: {**node, **shared(node)})


def share_blocks(group: int, prefix: str = "blocks_", keep: Sequence[int] = (), merge: str = "first") -> Transform:
    """Shares contiguous groups of blocks; the state of the transform is the `FoldPlan`, `unfold(params, state)` runs it.

    Args:
      group: blocks per group.
      prefix: name of the blocks without their index.
      keep: blocks that stay on their own.
      merge: `first` keeps the first block's leaves, `mean` takes the mean of the dense leaves of the group.

    Raises:
      ValueError: merge is unknown.
    """
    if merge not in ("first", "mean"):
        raise ValueError(f"merge must be 'first' or 'mean', got {merge!r}")

    def plan_of(params):
        return contiguous_plan(len(_find(params, prefix)[1]), group, prefix, keep)

    def update(params, plan, stats):
        del stats
        folded = fold(params, plan)
        return (folded if merge == "first" else _averaged(params, folded, plan)), plan

    return Transform(plan_of, update)


def _averaged(params: Any, folded: Any, plan: FoldPlan) -> Any:
    home, blocks = _find(params, plan.prefix)
    mean = lambda *xs: jnp.mean(jnp.stack(xs), 0).astype(xs[0].dtype)
    means = {f"{plan.prefix}{g[0]}": jax.tree.map(mean, *(blocks[i] for i in g)) for g in plan.groups}
    return _edit(folded, home, lambda node: {**node, **means})


def _find(tree: Any, prefix: str, home: tuple[str, ...] = ()) -> tuple[tuple[str, ...], dict[int, Any]]:
    """(path of the dict that holds the blocks, {index: block})."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    if isinstance(tree, Mapping):
        if blocks := {int(m[1]): v for k, v in tree.items() if (m := pattern.fullmatch(k))}:
            return home, dict(sorted(blocks.items()))
        for key, value in tree.items():
            if isinstance(value, Mapping) and (found := _find(value, prefix, (*home, key)))[1]:
                return found
    if not home:
        raise ValueError(
            f"no blocks named {prefix}0, {prefix}1, ... ; the tree has {sorted(leaves_with_paths(tree))[:6]} ..."
        )
    return home, {}


def _edit(tree: Any, home: tuple[str, ...], fn) -> Any:
    if not home:
        return fn(tree)
    return {k: _edit(v, home[1:], fn) if k == home[0] else v for k, v in tree.items()}


def _check_same(a: Any, b: Any, name_a: str, name_b: str) -> None:
    shapes = lambda t: {path_str(p): (x.shape, x.dtype) for p, x in jax.tree_util.tree_flatten_with_path(t)[0]}
    left, right = shapes(a), shapes(b)
    for path in sorted(left.keys() | right.keys()):
        if left.get(path) != right.get(path):
            raise ValueError(
                f"{name_a}/{path} is {left.get(path)}, {name_b}/{path} is {right.get(path)}: they cannot be shared"
            )
