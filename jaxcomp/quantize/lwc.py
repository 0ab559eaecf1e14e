"""What is learned about the rounding of a weight: clipping of its range, a rank-one compensation, an offset per weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.formats import Grid
from jaxcomp.quantize.straight_through import qparams


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


def clipped(
    kernel: Float[Array, "K N"], grid: Grid, logits: Float[Array, "M G 2"], rank_one: Mapping[str, Array] | None
) -> tuple[Float[Array, "N K"], Float[Array, "M G"], Float[Array, "M G"]]:
    """What is to be rounded, W + a b^T with W = kernel^T, and its scale and zero point, the range clipped by sigmoid(logits).

    OmniQuant, arXiv 2308.13137, eq. 2; ABQ-LLM, arXiv 2408.08554, for a b^T.
    """
    matrix = kernel.T
    if rank_one is not None:
        matrix = matrix + rank_one["a"][:, None] * rank_one["b"][None]
    factor = jax.nn.sigmoid(logits)
    return matrix, *qparams(matrix, grid, factor[..., 0], factor[..., 1])


def nudged(matrix: Float[Array, "N K"], scale: Float[Array, "M G"], offset: Float[Array, "N K"]) -> Float[Array, "N K"]:
    """The matrix with each entry moved by `offset` steps of its grid, at most half a step: which way it rounds is learned.

    The offsets of AutoRound (Cheng et al., arXiv 2309.05516).
    """
    grouped = matrix.reshape(*matrix.shape[:-1], scale.shape[-1], -1)
    step = jnp.clip(offset, -0.5, 0.5).reshape(grouped.shape) * scale[..., None]
    return (grouped + step).reshape(matrix.shape)
