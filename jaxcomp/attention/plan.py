"""Which keys each segment of queries visits, and in which order: the common form of all sparse-attention methods here."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.sparse_attention.rank import packed_order


class Plan(NamedTuple):
    """Lists of keys per segment of queries; a segment's own keys are never listed, it always sees them.

    Attributes:
      order: key slots from first to last, of H = Hq lists or of one per key head.
      limit: how many entries of each list count, in whole blocks (the last is filled up from the list); None: all of the history.
      query_order: rows of every segment in the order in which they form tiles; None keeps theirs.
    """

    order: Int[Array, "H M L"]
    limit: Int[Array, "H M"] | None = None
    query_order: Int[Array, "Hq M C"] | None = None


def history(length: int, segment: int, keys: int, *, causal: bool = True, start: int = 0) -> Bool[Array, "M S"]:
    """Keys outside a segment that its rows see: all before it, or all but its own; `start` is the slot of query 0."""
    first = start + segment * jnp.arange(-(-length // segment))[:, None]
    slot = jnp.arange(keys)[None]
    return slot < first if causal else (slot < first) | (slot >= first + segment)


def from_mask(mask: Bool[Array, "H M N"], segment: int) -> Plan:
    """A causal plan that visits the marked keys of the history in their own order; others fill the last block."""
    length = mask.shape[-1]
    earlier = history(length, segment, length)[None]
    mask = mask & earlier
    return Plan(packed_order(mask.astype(jnp.float32), earlier), mask.sum(-1, dtype=jnp.int32))


def from_blocks(blocks: Bool[Array, "H M M"], block: int, length: int) -> Plan:
    """A causal plan of whole key blocks; each block of queries is a segment and sees its own block anyway."""
    return from_mask(jnp.repeat(blocks, block, axis=2)[..., :length], block)
