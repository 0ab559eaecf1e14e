"""What is static about a weight, and what a back end is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.arbitrary_bit_matmul.packing import check_bits


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """Static facts of a quantized matrix W [N, K], W[n, k] = (u - zero) * scale.

    Attributes:
      n: rows, the outputs.
      k: columns, the inputs.
      groups: scales per row, each over k // groups consecutive columns.
      bits: stored bits per code, 1..8.
      levels: codes in use, 2..2**bits; 0 means 2**bits.

    Raises:
      ValueError: bits, levels or groups out of range.
    """

    n: int
    k: int
    groups: int
    bits: int
    levels: int = 0

    def __post_init__(self):
        check_bits(self.bits)
        if self.levels and not 2 <= self.levels <= 2**self.bits:
            raise ValueError(f"levels must be in 2..{2**self.bits} for {self.bits} bits, found {self.levels}")
        if self.groups < 1 or self.k % self.groups:
            raise ValueError(f"K = {self.k} columns do not split into {self.groups} equal groups")

    @property
    def centre(self) -> int:
        """The middle code, which kernels subtract: the zero point of a symmetric grid."""
        return (self.levels or 2**self.bits) // 2

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.k // self.groups


Tile = tuple[int, ...]  # sizes by which a kernel cuts a problem; what each means is the kernel's own


class Backend(NamedTuple):
    """One implementation of the core product.

    Attributes:
      name: as in `implementation=`.
      layouts: names of the weight layouts that it reads, from the spec; the first is what `prepare` makes.
      refuse: (spec, x) -> why it does not cover this problem, or None. Shapes and dtypes only.
      matmul: (x, weight, scale, spec) -> float32 [M, N] = sum_g scale[n,g] sum_(k in g) x[m,k] (u[n,k] - centre), for x int8
        (exact inside a group) or floating point [M, K], scale float32 [N, G] and weight `Prepared` in one of its layouts;
        with `tile=` where there are tiles to choose.
      tiles: (spec, x) -> tiles that a search may try, the default first.
    """

    name: str
    layouts: Callable[[WeightSpec], tuple[str, ...]]
    refuse: Callable[[WeightSpec, jax.Array], str | None]
    matmul: Callable[..., jax.Array]
    tiles: Callable[[WeightSpec, jax.Array], tuple[Tile, ...]] = lambda spec, x: ()
