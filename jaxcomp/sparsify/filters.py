"""Soft filter pruning (He et al., IJCAI 2018, arXiv 1808.06866), over channels that residual streams tie together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, map_leaves, replace_leaves
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.sparsify.magnitude import keep_largest

Member = tuple[str, int]  # path of a leaf, and the axis that holds the channels


class Space(NamedTuple):
    """Channels that can only go together.

    Attributes:
      producers: leaves that write these channels, biases too: where all of them are zero the channel is zero.
      followers: leaves that read the channels, or only scale them.
    """

    producers: tuple[Member, ...]
    followers: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them."""
        return self.producers + self.followers


def conv_members(*modules: str) -> tuple[Member, ...]:
    """Kernels and biases of convolutions (or Dense layers), by their output channels."""
    return tuple((f"{module}/{leaf}", -1) for module in modules for leaf in ("kernel", "bias"))


def readers(*modules: str) -> tuple[Member, ...]:
    """Kernels of convolutions (or Dense layers), by their input channels."""
    return tuple((f"{module}/kernel", -2) for module in modules)


def rlfn_spaces(num_blocks: int) -> tuple[Space, ...]:
    """The trunk of `models.rlfn.RLFN`: one space that the long skip ties, and one after every block.

    The inner width `mid` of the blocks is not among them, as in the network of the NTIRE 2022 challenge.
    """
    name = lambda i, *modules: [f"blocks_{i}/{module}" for module in modules]
    spaces = []
    for i in range(num_blocks + 1):
        written = ["head", "trunk"] if i == 0 else name(i - 1, "fuse")
        read = ["upsample"] if i == 0 else name(i - 1, "esa/reduce")
        scaled = [] if i == 0 else name(i - 1, "esa/expand")
        if i < num_blocks:  # the residual of block i adds its third convolution to this space
            written += name(i, "conv_2")
            read += name(i, "conv_0", "fuse")
        else:
            read += ["trunk"]
        spaces.append(Space(conv_members(*written), conv_members(*scaled) + readers(*read)))
    return tuple(spaces)


def channel_norms(params: Any, space: Space) -> Float[Array, "C"]:
    """Sum over all members of the L2 norm of each channel's slice, float32."""
    return sum(_norms(leaf, axis) for leaf, axis in _slices(leaves_with_paths(params), space.members))


def soft_filter_pruning(spaces: Sequence[Space], rate: float) -> Transform:
    """Zeroes, in every space, the producers of the round(rate * C) channels of smallest `channel_norms`.

    Followers stay, so that a zeroed filter receives gradients and may recover: with `core.transform.wrap_optax(optimizer,
    soft_filter_pruning(...), every=steps_per_epoch)` this is the schedule of the paper, which ranks filters by their own norm
    only and each layer for itself. `remove_zero_filters` takes the channels out at the end.

    Raises:
      ValueError: the rate is not in [0, 1); a member is missing, compressed, or its channels differ from the others'.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")

    def update(params: Any, stats: Any) -> Any:
        leaves = leaves_with_paths(params)
        for space in spaces:
            keep = keep_largest(channel_norms(params, space), 1 - rate)
            pruned = {path: leaf * _along(keep, leaf, axis) for (path, axis), leaf in _producers(leaves, space)}
            leaves |= pruned
            params = replace_leaves(params, pruned)
        return params

    return stateless(update)


def remove_zero_filters(spaces: Sequence[Space]) -> Transform:
    """Takes out every channel whose producers are all zero: a smaller tree of the same function. Needs concrete arrays.

    Raises:
      ValueError: a space would lose all its channels; a member is missing, compressed, or its channels differ.
    """

    def update(params: Any, stats: Any) -> Any:
        keep: dict[str, dict[int, np.ndarray]] = {}
        for space in spaces:
            kept = _nonzero(leaves_with_paths(params), space)
            for path, axis in space.members:
                keep.setdefault(path, {})[axis] = kept
        return map_leaves(lambda path, leaf: _take(leaf, keep.get(path, {})), params)

    return stateless(update)


def _nonzero(leaves: Mapping[str, Any], space: Space) -> np.ndarray:
    """Channels that some producer writes."""
    list(_slices(leaves, space.members))  # all members agree on the channels
    alive = sum(np.asarray(_norms(leaf, axis)) for leaf, axis in _slices(leaves, space.producers)) > 0
    if not alive.any():
        raise ValueError(f"{space.producers[0][0]}: all {alive.size} channels are zero; prune at a lower rate")
    return np.flatnonzero(alive)


def _take(leaf: Any, keep: Mapping[int, np.ndarray]) -> Any:
    for axis, channels in keep.items():
        leaf = jnp.take(leaf, channels, axis=axis)
    return leaf


def _producers(leaves: Mapping[str, Any], space: Space):
    return zip(space.producers, (leaf for leaf, _ in _slices(leaves, space.producers)), strict=True)


def _slices(leaves: Mapping[str, Any], members: Sequence[Member]):
    """(leaf, axis) of every member; raises ValueError unless all are dense arrays with the same number of channels."""
    first, first_axis = members[0]
    for path, axis in members:
        leaf = leaves.get(path)
        if leaf is None or is_compressed(leaf):
            found = "nothing" if leaf is None else f"a {leaf.kind} leaf"
            raise ValueError(f"{path}: expected a dense array, found {found}; prune filters before other methods")
        if leaf.shape[axis] != leaves[first].shape[first_axis]:
            expected = f"{leaves[first].shape[first_axis]} channels as in {first}"
            raise ValueError(f"{path}: expected {expected}, found {leaf.shape[axis]}; correct the space")
        yield leaf, axis


def _norms(leaf: Array, axis: int) -> Float[Array, "C"]:
    slices = jnp.moveaxis(jnp.asarray(leaf, jnp.float32), axis, 0).reshape(leaf.shape[axis], -1)
    return jnp.linalg.norm(slices, axis=1)


def _along(keep: Array, leaf: Array, axis: int) -> Array:
    """The mask in the shape and dtype that multiply a leaf along one axis."""
    shape = [1] * leaf.ndim
    shape[axis] = keep.size
    return keep.reshape(shape).astype(leaf.dtype)
