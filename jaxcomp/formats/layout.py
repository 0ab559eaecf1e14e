"""How a logical array lies in the row matrix [N, K] that quantizers, packers and kernels see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np

from jaxcomp.core.leaf import Parts


class Layout(Parts):
    """A view of a matrix [N, K]: rows N are what a contraction keeps, columns K what it sums over.

    `rows` and `cols` are the sizes of the stored axes (prod(rows) = N, prod(cols) = K); logical axis i is stored axis
    `perm[i]`. A Dense kernel [in, out] has rows (out,), cols (in,), perm (1, 0); a convolution HWIO has rows (O,), cols (H, W,
    I), perm (1, 2, 3, 0); an embedding [vocab, dim] has rows (vocab,), cols (dim,), perm (0, 1). Leading batch axes (stacked
    layers, `vmap`) are not part of the layout: they lead in the matrix as in the array.
    """

    kind = "layout"
    rows: tuple[int, ...] = eqx.field(static=True)
    cols: tuple[int, ...] = eqx.field(static=True)
    perm: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self):
        if sorted(self.perm) != list(range(len(self.rows) + len(self.cols))) or min(self.stored, default=1) < 1:
            raise ValueError(f"layout: perm {self.perm} does not order rows {self.rows} and cols {self.cols}")

    @classmethod
    def of(cls, shape: Sequence[int], contract: Sequence[int]) -> Layout:
        """The layout of an array of `shape` whose axes `contract` are summed over."""
        contract = sorted(axis % len(shape) for axis in contract)
        keep = [axis for axis in range(len(shape)) if axis not in contract]
        order = keep + contract
        return cls(
            rows=tuple(int(shape[a]) for a in keep),
            cols=tuple(int(shape[a]) for a in contract),
            perm=tuple(order.index(a) for a in range(len(shape))),
        )

    @property
    def stored(self) -> tuple[int, ...]:
        """Sizes of the stored axes, rows first."""
        return self.rows + self.cols

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, without batch axes."""
        return tuple(self.stored[p] for p in self.perm)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return math.prod(self.rows), math.prod(self.cols)

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """[*batch, *shape] -> [*batch, N, K]."""
        batch = x.ndim - len(self.perm)
        order = [*range(batch), *(batch + p for p in np.argsort(self.perm))]
        return x.transpose(order).reshape(*x.shape[:batch], *self.matrix_shape)

    def to_array(self, matrix: jax.Array) -> jax.Array:
        """[*batch, N, K] -> [*batch, *shape]."""
        batch = matrix.ndim - 2
        order = [*range(batch), *(batch + p for p in self.perm)]
        return matrix.reshape(*matrix.shape[:batch], *self.stored).transpose(order)

    def is_row(self, axis: int) -> bool:
        """True if logical `axis` is a row axis."""
        return self.perm[axis] < len(self.rows)

    def contraction_order(self, axes: Sequence[int]) -> list[int] | None:
        """Positions in `axes` (logical) in stored column order, or None if `axes` are not exactly the columns."""
        stored = [self.perm[a] - len(self.rows) for a in axes]
        return list(np.argsort(stored)) if sorted(stored) == list(range(len(self.cols))) else None

    def transpose(self, permutation: Sequence[int]) -> Layout:
        """The layout after `jnp.transpose(x, permutation)`."""
        return Layout(self.rows, self.cols, tuple(self.perm[p] for p in permutation))

    def reshape(self, shape: Sequence[int]) -> Layout | None:
        """The layout after `x.reshape(shape)`, or None if rows and columns would mix."""
        if (chunks := _common_chunks(self.shape, tuple(shape))) is None:
            return None
        sizes = {p: [n] for p, n in enumerate(self.stored)}  # stored axis -> the sizes it becomes
        order = []  # per new logical axis: (stored axis, position within it); stored axis -1 holds new axes of size one
        for old, new in chunks:
            stored = [self.perm[a] for a in old]
            if stored and not self._consecutive(stored):
                return None
            home = stored[0] if stored else -1
            start = 0 if stored else len(sizes.setdefault(-1, []))
            sizes[home] = sizes.get(home, [])[:start] + list(new)
            sizes.update({other: [] for other in stored[1:]})
            order += [(home, start + i) for i in range(len(new))]
        return self._assemble(sizes, order)

    def _consecutive(self, stored: list[int]) -> bool:
        """Stored axes that follow each other on one side, so that they may merge."""
        same_side = (stored[0] < len(self.rows)) == (stored[-1] < len(self.rows))
        return same_side and stored == list(range(stored[0], stored[0] + len(stored)))

    def _assemble(self, sizes: dict[int, list[int]], order: list[tuple[int, int]]) -> Layout:
        rows = [*range(len(self.rows)), -1]
        cols = range(len(self.rows), len(self.stored))
        keys = [(home, i) for home in [*rows, *cols] for i in range(len(sizes.get(home, [])))]
        flat = [tuple(n for home in side for n in sizes.get(home, [])) for side in (rows, cols)]
        return Layout(*flat, tuple(keys.index(key) for key in order))


def _common_chunks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs of (old axes, sizes of new axes) with equal products, in order; size-1 axes stand alone."""
    if math.prod(old) != math.prod(new) or 0 in old:
        return None
    chunks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            chunks.append(([], [1]))
            j += 1
            continue
        axes, sizes, left, right = [i], [], old[i], 1
        i += 1
        while left != right:
            if left < right:
                axes.append(i)
                left *= old[i]
                i += 1
            else:
                sizes.append(new[j])
                right *= new[j]
                j += 1
        if left == 1 and not sizes and j < len(new) and new[j] == 1:
            sizes.append(1)
            j += 1
        chunks.append((axes, sizes))
    return chunks
