"""Running a trunk on some of a chunk's tokens: static capacities, one of which is chosen while sampling.

The number of wanted tokens depends on the data, the shapes of a compiled program cannot. So a ladder of capacities is compiled
and `lax.switch` takes the smallest that holds the wanted tokens of every sample; only that branch runs. Places that are left over
go to the tokens that come next. Do not `vmap` over it: a batched choice runs all branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.models.video_dit import write_tokens


class Wanted(NamedTuple):
    """Which tokens to compute.

    Attributes:
      need: the tokens that should be.
      rank: at least 0; of needed tokens the larger go first where not all fit, of others where places are left.
    """

    need: Bool[Array, "B L"]
    rank: Float[Array, "B L"]


class Computed(NamedTuple):
    """What a chunk step computed.

    Attributes:
      h: the trunk's output at the computed tokens, its input elsewhere.
      cache: of the chunk.
      mask: the computed tokens.
      tokens: computed tokens per sample: the capacity that was taken.
    """

    h: Float[Array, "B L D"]
    cache: Any
    mask: Bool[Array, "B L"]
    tokens: Int[Array, ""]


class Ladder(NamedTuple):
    """Capacities of the partial forward.

    Attributes:
      capacities: tokens, rising, each in 1..L-1; without any a chunk step computes all tokens or none.
      defer: where more are wanted than the largest capacity holds, but not all: True leaves the rest for later steps, False
        computes all.
    """

    capacities: tuple[int, ...] = ()
    defer: bool = False


ALL_OR_NONE = Ladder()


def ladder(tokens: int, shares: Sequence[float], defer: bool = False) -> Ladder:
    """Capacities as shares of the L tokens of a chunk.

    Raises:
      ValueError: a share outside of (0, 1), one that leaves no token, or nothing to defer to.
    """
    capacities = tuple(sorted({round(share * tokens) for share in shares}))
    if any(not 0 < share < 1 for share in shares) or any(not 0 < c < tokens for c in capacities):
        found = f"shares {tuple(shares)} of {tokens} tokens"
        raise ValueError(
            f"a capacity must hold at least 1 token and fewer than all, found {found}; leave such shares out"
        )
    return check_ladder(Ladder(capacities, defer), tokens)


def check_ladder(ladder: Ladder, tokens: int) -> Ladder:
    """The ladder itself. Raises ValueError unless its capacities rise strictly within 1..L-1 and `defer` has one to use."""
    sizes = np.asarray(ladder.capacities, int)
    if sizes.size and (sizes.min() < 1 or sizes.max() >= tokens or (np.diff(sizes) <= 0).any()):
        raise ValueError(
            f"capacities must rise strictly within 1..{tokens - 1}, found {ladder.capacities}; none and all are always possible"
        )
    if ladder.defer and not sizes.size:
        raise ValueError("nothing can be deferred without a capacity; pass capacities or defer=False")
    return ladder


def compute_tokens(
    trunk: Callable[[Array, Any, Array | None], tuple[Array, Any]],
    h: Float[Array, "B L D"],
    cache: Any,
    wanted: Wanted,
    ladder: Ladder,
) -> Computed:
    """Runs `trunk(h [B, T, D], cache, index) -> (h', cache)` on the wanted tokens and those that share their capacity."""
    batch, length, _ = h.shape

    def nothing(h, cache):
        return Computed(h, cache, jnp.zeros((batch, length), bool), jnp.int32(0))

    def everything(h, cache):
        return Computed(*trunk(h, cache, None), jnp.ones((batch, length), bool), jnp.int32(length))

    def some(capacity):
        def run(h, cache):
            index = _first(wanted, capacity)
            out, new = trunk(jnp.take_along_axis(h, index[..., None], axis=1), cache, index)
            mask = write_tokens(jnp.zeros((batch, length), bool), jnp.ones(index.shape, bool), index)
            return Computed(write_tokens(h, out, index), new, mask, jnp.int32(capacity))

        return run

    branches = [nothing, *map(some, ladder.capacities), everything]
    return jax.lax.switch(_rung(wanted, ladder), branches, h, cache)


def _first(wanted: Wanted, capacity: int) -> Int[Array, "B T"]:
    """The tokens that take the places of a capacity, in their own order."""
    priority = wanted.need.astype(jnp.float32) + wanted.rank / (1 + wanted.rank)
    return jnp.sort(jax.lax.top_k(priority, capacity)[1], axis=1)


def _rung(wanted: Wanted, ladder: Ladder) -> Int[Array, ""]:
    """Index of the branch: 0 computes nothing, the last everything."""
    count = jnp.max(wanted.need.sum(1, dtype=jnp.int32))
    rung = jnp.searchsorted(jnp.array([0, *ladder.capacities], jnp.int32), count).astype(jnp.int32)
    if ladder.defer:
        rung = jnp.where(wanted.need.all(), rung, jnp.minimum(rung, len(ladder.capacities)))
    return rung
