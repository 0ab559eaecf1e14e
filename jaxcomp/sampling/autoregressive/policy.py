"""Which tokens of a chunk are computed at a step: the role of a cache in chunk-wise sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.sampling.autoregressive.tokens import Wanted


class Step(NamedTuple):
    """Where a chunk stands.

    Attributes:
      index: the inference step that it is about to do, also the number of steps that it has done.
      last: whether it is its last step.
      chunk: its place in the video.
    """

    index: Int[Array, ""]
    last: Bool[Array, ""]
    chunk: int


class Seen(NamedTuple):
    """What a chunk step leaves to look at; cached tokens are part of all three.

    Attributes:
      hidden: the trunk's output.
      x0: the clean sample that the solver would reach if the output stayed as it is.
      latent: the latents after the step.
    """

    hidden: Float[Array, "B L D"]
    x0: Float[Array, "B L C"]
    latent: Float[Array, "B L C"]


class TokenPolicy(NamedTuple):
    """Decides per token and step; one state for every chunk and guidance branch, a pytree of fixed shapes.

    Attributes:
      init: `init(h, seen) -> state` before a chunk's first step; of the arguments only shapes and dtypes matter.
      decide: `decide(state, step, h) -> (Wanted, state)`; h [B, L, D] is the trunk's input. Step 0 must want all tokens.
      observe: `observe(state, step, computed bool[B, L], seen, before) -> state` after the step; `before` is the state of the
        chunk before, None for the first.
    """

    init: Callable[[Array, Seen], Any]
    decide: Callable[[Any, Step, Array], tuple[Wanted, Any]]
    observe: Callable[[Any, Step, Array, Seen, Any], Any]


def all_or_none(wanted: Bool[Array, ""], h: Float[Array, "B L D"]) -> Wanted:
    """All tokens of the chunk, or none."""
    return Wanted(jnp.broadcast_to(wanted, h.shape[:2]), jnp.zeros(h.shape[:2], jnp.float32))


def every_step() -> TokenPolicy:
    """Computes everything: the engine without reuse."""
    return TokenPolicy(
        init=lambda h, seen: (),
        decide=lambda state, step, h: (all_or_none(jnp.array(True), h), state),
        observe=lambda state, step, computed, seen, before: state,
    )
