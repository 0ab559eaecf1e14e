"""What is learned about the rounding of a weight: clipping of its range and a rank-one compensation; grids with bit balance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.formats import ActivationQuantizer, FakeQuantizedArray, Grid
from jaxcomp.quantize.scheme import Scheme


def balanced(grid: Grid) -> Grid:
    """ABQ-LLM's bit balance (arXiv 2408.08554): 2^b + 1 levels for b in {1, 2}, stored in b + 1 bits; other grids as they are."""
    if grid.bits > 2 or grid.levels:
        return grid
    return Grid(grid.bits + 1, 2**grid.bits + 1, grid.symmetric, grid.group_size)


def clip_logits(shape: tuple[int, int], grid: Grid, value: float) -> Float[Array, "M G 2"]:
    """Initial logits of the factors on (min, max) of each scale of a matrix [N, K]; sigmoid(4) = 0.982 is the authors' choice."""
    rows = 1 if grid.group_size == -1 else shape[0]
    return jnp.full((rows, grid.groups(shape[1]), 2), value, jnp.float32)


def compensation(shape: tuple[int, int]) -> dict[str, Array]:
    """Initial rank-one term a b^T of a matrix [N, K]: a = 0 and b = 1, so that it changes nothing."""
    return {"a": jnp.zeros(shape[0]), "b": jnp.ones(shape[1])}


def compensated_blocks(num_layers: int, first: int = 3, last: int = 4) -> frozenset[int]:
    """Blocks whose down projection is compensated: the `first` and the `last`.

    In models of fewer than 13 layers at most a sixth of them (rounded up) at the beginning and a third at the end.
    """
    first, last = min(first, math.ceil(num_layers / 6)), min(last, math.ceil(num_layers / 3))
    return frozenset(range(first)) | frozenset(range(num_layers - last, num_layers))


def fake_weight(
    kernel: Float[Array, "I O"],
    scheme: Scheme,
    logits: Float[Array, "M G 2"],
    rank_one: Mapping[str, Array] | None = None,
    *,
    balance: bool = False,
) -> FakeQuantizedArray:
    """A Dense kernel on its grid, range clipped by sigmoid(logits): Q(W + a b^T) with W = kernel^T (arXiv 2308.13137, eq. 2)."""
    grid, act = scheme.grid, scheme.act
    if balance:
        grid = balanced(grid)
        act = None if act is None else ActivationQuantizer(balanced(act.grid))
    leaf = FakeQuantizedArray.of(kernel, grid, (0,), act)
    value = leaf.value if rank_one is None else leaf.value + rank_one["a"][:, None] * rank_one["b"][None]
    value = jax.lax.reduce_precision(value, 8, 23)
    return dataclasses.replace(leaf, value=value, clip=jax.nn.sigmoid(logits))
