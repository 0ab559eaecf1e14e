"""Magnitude group masks: the data-free baseline of structured sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.leaf import replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.formats import MaskedArray, packing
from jaxcomp.quantize.scheme import KERNELS, targets


def keep_largest(scores: jax.Array, density: float) -> jax.Array:
    """Keeps, in every row, the round(density * G) groups with the largest scores; ties go to the lower index.

    Args:
      scores: float [*batch, N, G].
      density: share kept, 0 < density <= 1.

    Returns:
      bool [*batch, N, G].
    """
    groups = scores.shape[-1]
    kept = max(1, round(density * groups))
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1, stable=True)
    return rank < kept


def magnitude(density: float, group_size: int = 1, *, rules: Sequence[Rule] = KERNELS) -> Transform:
    """Masks the groups of consecutive inputs with the smallest L2 norm, the same number in every output row.

    Args:
      density: share of groups kept in each row, in (0, 1].
      group_size: inputs per group; 1 is unstructured. Must divide in_dim.
      rules: which leaves.

    Raises:
      ValueError: density or group size out of range, or a group size that does not divide a leaf's in_dim.
    """

    def update(params, stats):
        chosen = targets(params, rules, {"group_size": group_size, "bits": 8}, stats)
        return replace_leaves(params, {t.path: _mask(t, density) for t in chosen})

    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    return stateless(update)


def _mask(target: Any, density: float) -> MaskedArray:
    size = target.scheme.group_size
    grouped = target.matrix.reshape(*target.matrix.shape[:-1], -1, size)
    keep = keep_largest(jnp.linalg.norm(grouped, axis=-1), density)
    dtype = jnp.dtype(target.dtype)
    return MaskedArray(
        target.matrix.astype(dtype), packing.pack(keep.astype(jnp.uint8), 1), target.layout, size, dtype.name
    )
