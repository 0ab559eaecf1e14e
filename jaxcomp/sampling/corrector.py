"""Correctors: what may change a step's output and the state after it, with a memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array


class Corrector(NamedTuple):
    """Acts on the solver's output o (noise, velocity or clean sample: see `solvers`), after the denoiser and before the update.

    Attributes:
      init: `init(x) -> state`, x the initial latents [B, ...].
      on_output: `on_output(state, out, x, i) -> (out, state)`.
      on_state: `on_state(state, x_next, out, i) -> (x_next, state)`.
    """

    init: Callable[[Array], Any] = lambda x: ()
    on_output: Callable[[Any, Array, Array, Any], tuple[Array, Any]] = lambda state, out, x, i: (out, state)
    on_state: Callable[[Any, Array, Array, Any], tuple[Array, Any]] = lambda state, x_next, out, i: (x_next, state)


def chain(*correctors: Corrector) -> Corrector:
    """Applies correctors in order; the state is the tuple of their states."""

    def fold(states, value, step):
        new = []
        for corrector, state in zip(correctors, states, strict=True):
            value, state = step(corrector, state, value)
            new.append(state)
        return value, tuple(new)

    return Corrector(
        init=lambda x: tuple(c.init(x) for c in correctors),
        on_output=lambda states, out, x, i: fold(states, out, lambda c, s, v: c.on_output(s, v, x, i)),
        on_state=lambda states, x, out, i: fold(states, x, lambda c, s, v: c.on_state(s, v, out, i)),
    )
