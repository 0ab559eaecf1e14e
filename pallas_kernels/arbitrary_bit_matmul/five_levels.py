"""Storage of five-level codes u in {0..4}, the W2* of ABQ-LLM, which carry log2(5) = 2.32 bits of information.

planes   three bit planes, the reference's choice: 3 bits per weight
base 5   three codes t = u0 + 5 u1 + 25 u2 < 125 in 7 bits: 7/3 bits per weight
sparse   4 = 100b is the only code with bit 2, and its bits 0 and 1 are 0: two dense planes, and a list of the columns of
         every row where the code is 4; 2 + 16 C / K bits, C the longest list
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt16, UInt32

from pallas_kernels.arbitrary_bit_matmul import packing

LEVELS = 5
_TRIPLE_BITS = 7


class SparseTopPlane(NamedTuple):
    """Five-level codes as two dense planes and the columns of the third.

    Attributes:
      low: dense 2-bit codes u & 3, uint32 [N, ceil(K / 16)].
      columns: where u = 4, uint16 [N, C]; rows with fewer than C entries are filled with K.
    """

    low: UInt32[Array, "n words"]
    columns: UInt16[Array, "n c"]


def pack_base5(codes: UInt8[Array, "*rows k"]) -> UInt32[Array, "*rows words"]:
    """Triples of codes in 7 bits: triple i of a row holds codes i, T + i and 2 T + i, T = ceil(K / 3)."""
    low, middle, high = jnp.split(packing.pad_last(codes, 3), 3, axis=-1)
    return packing.pack_dense(low + jnp.uint8(5) * middle + jnp.uint8(25) * high, _TRIPLE_BITS)


def unpack_base5(words: UInt32[Array, "*rows words"], k: int) -> UInt8[Array, "*rows k"]:
    """Codes of `pack_base5`."""
    triples = packing.unpack_dense(words, _TRIPLE_BITS, -(-k // 3))
    five = jnp.uint8(5)
    return jnp.concatenate([triples % five, triples // five % five, triples // jnp.uint8(25)], -1)[..., :k]


def pack_sparse(codes: UInt8[np.ndarray, "n k"]) -> SparseTopPlane:
    """Two dense planes and the list of fours; a host function, since the list's length depends on the codes.

    Raises:
      ValueError: K >= 65536, where a column does not fit uint16.
    """
    codes = np.asarray(codes)
    n, k = codes.shape
    if k >= 2**16:
        raise ValueError(f"a sparse plane addresses at most 65535 columns, found {k}; use base 5")
    fours = codes == LEVELS - 1
    capacity = int(fours.sum(1).max(initial=0))
    order = np.argsort(~fours, axis=1, kind="stable")[:, :capacity]
    columns = np.where(np.take_along_axis(fours, order, 1), order, k).astype(np.uint16)
    return SparseTopPlane(packing.pack_dense(jnp.asarray(codes & 3), 2), jnp.asarray(columns.reshape(n, capacity)))


def unpack_sparse(sparse: SparseTopPlane, k: int) -> UInt8[Array, "n k"]:
    """Codes of `pack_sparse`."""
    low = packing.unpack_dense(sparse.low, 2, k)
    rows = jnp.arange(low.shape[0])[:, None]
    return low.at[rows, sparse.columns.astype(jnp.int32)].add(jnp.uint8(4), mode="drop")


def sparse_plane_product(x: Int[Array, "m k"], sparse: SparseTopPlane) -> Int[Array, "m n"]:
    """The third plane's part of x u^T, in the dtype of x: 4 times the sum of the listed columns."""
    padded = jnp.pad(x, ((0, 0), (0, 1)))
    return 4 * padded[:, sparse.columns.astype(jnp.int32)].sum(-1, dtype=x.dtype)


def storage_bits(codes: UInt8[np.ndarray, "n k"]) -> dict[str, float]:
    """Bits per weight of every storage for these codes, padding included."""
    codes = jnp.asarray(codes)
    stored = {"planes": packing.pack_planes(codes, 3), "base5": pack_base5(codes), "sparse": pack_sparse(codes)}
    return {name: 8 * sum(a.nbytes for a in jax.tree.leaves(s)) / codes.size for name, s in stored.items()}
