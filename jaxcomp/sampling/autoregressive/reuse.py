"""What stands in for the tokens that a chunk step leaves out.

- "residual": h' - h of the trunk; the head and its modulation stay fresh (MotionCache for SkyReels-V2, TeaCache).
- "output": the network's output, the velocity for a flow.
- "displacement": the token's last move x_{i+1} - x_i (MotionCache and FlowCache for MAGI-1); Euler steps only, where it is the
  output times the length of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.sampling.autoregressive.tokens import Computed

Reuse = Literal["residual", "output", "displacement"]
Memory = tuple[Array, ...]  # (residual,) or (output or displacement, hidden)


def empty_memory(reuse: Reuse, h: Float[Array, "B L D"], x: Float[Array, "B L C"]) -> Memory:
    """Memory before the first step, which computes all tokens."""
    return (jnp.zeros_like(h),) if reuse == "residual" else (jnp.zeros_like(x), jnp.zeros_like(h))


def combine(
    reuse: Reuse,
    memory: Memory,
    h: Float[Array, "B L D"],
    done: Computed,
    head: Callable[[Array], Array],
    length: Float[Array, ""],
) -> tuple[Float[Array, "B L D"], Float[Array, "B L C"], Memory]:
    """(trunk output, network output, new memory) of all tokens; `length` of the step is s_{i+1} - s_i for a flow."""
    fresh = done.mask[..., None]
    if reuse == "residual":
        hidden = jnp.where(fresh, done.h, h + memory[0])
        return hidden, head(hidden), (jnp.where(fresh, done.h - h, memory[0]),)
    hidden = jnp.where(fresh, done.h, memory[1])
    out, scale = head(hidden), length if reuse == "displacement" else jnp.ones_like(length)
    kept = jnp.where(fresh, out * scale, memory[0])
    return hidden, jnp.where(fresh, out, kept / scale), (kept, hidden)
