"""MotionCache: which tokens of an autoregressive video are computed, by how much they move.

"Motion-Aware Caching for Efficient Autoregressive Video Generation" (arXiv 2605.01725). A chunk begins with full steps (warm-up),
then decides as a whole (FlowCache's rule), then for every token: moving tokens, those that differ from the frame before,
accumulate the chunk's distance at the full rate, still ones at a lower rate (equations 9, 10, 12 and 13).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.sampling.autoregressive.distance import Distance
from jaxcomp.sampling.autoregressive.policy import Seen, Step, TokenPolicy
from jaxcomp.sampling.autoregressive.tokens import Wanted

Proxy = Literal["hidden", "x0", "latent"]
Motion = Callable[[Seen, Step], Float[Array, "B F S"]]


@dataclasses.dataclass(frozen=True)
class MotionCacheConfig:
    """Hyper-parameters; the defaults are those of the authors' program for SkyReels-V2.

    Attributes:
      warmup: a chunk's steps 0..warmup compute all its tokens.
      coarse: then it decides as a whole for so many computed steps, or steps.
      coarse_by: whether `coarse` counts "computed" steps (SkyReels-V2) or all "steps" (MAGI-1, and the paper's text).
      floor: weight of a still token, alpha in (10); 1 is FlowCache.
      proxy: what frames are compared by: the trunk's output "hidden" (SkyReels-V2), the "latent" after the step (equation 9, and
        MAGI-1), or the estimate "x0" of the clean sample, which ranks tokens better while there is noise; or a function of
        (Seen, Step) that returns the motion itself.
      relative: differences are divided by the magnitude of the frame before (SkyReels-V2).
      normalise: motion within a frame becomes a weight by its least and largest value ("minmax", equation 10) or by the
        largest alone ("max").
      first_frame: the very first frame takes the motion of the second ("copy", the paper) or weight 1 ("one", MAGI-1).
      vote: a place is computed in all frames of a chunk iff more than this share of them want it; None: every token for itself.
      min_share: a step at which a smaller share of the tokens is wanted computes none, and they go on accumulating.
      max_reuse: at most this share of tokens, those with the lowest accumulators, is left out; an array has one entry per step.
      strict: a token is wanted above the threshold (the paper's >), not from it on.
      force_last: a chunk's last step computes all tokens (MAGI-1).

    Raises:
      ValueError: a value out of range.
    """

    warmup: int = 4
    coarse: int = 6
    coarse_by: Literal["computed", "steps"] = "computed"
    floor: float | Array = 0.6
    proxy: Proxy | Motion = "hidden"
    relative: bool = True
    normalise: Literal["minmax", "max"] = "minmax"
    first_frame: Literal["copy", "one"] = "copy"
    vote: float | None = 0.5
    min_share: float = 0.4
    max_reuse: float | Array | None = None
    strict: bool = False
    force_last: bool = False

    def __post_init__(self):
        shares = {name: getattr(self, name) for name in ("floor", "vote", "min_share", "max_reuse")}
        wrong = {k: v for k, v in shares.items() if isinstance(v, int | float) and not 0 <= v <= 1}
        if wrong or min(self.warmup, self.coarse) < 0:
            found = wrong or {"warmup": self.warmup, "coarse": self.coarse}
            raise ValueError(f"MotionCache: shares lie within [0, 1] and counts are at least 0, found {found}")
        for name, known in _CHOICES.items():
            if isinstance(value := getattr(self, name), str) and value not in known:
                raise ValueError(f"MotionCache: {name} must be one of {', '.join(known)}, found {value!r}")


_CHOICES = {
    "coarse_by": ("computed", "steps"),
    "proxy": ("hidden", "x0", "latent"),
    "normalise": ("minmax", "max"),
    "first_frame": ("copy", "one"),
}
SKYREELS = MotionCacheConfig()
MAGI = MotionCacheConfig(
    coarse=20,
    coarse_by="steps",
    proxy="latent",
    relative=False,
    first_frame="one",
    vote=None,
    min_share=0.0,
    force_last=True,
)
PAPER = MotionCacheConfig(coarse_by="steps", proxy="latent", relative=False, vote=None, min_share=0.0, strict=True)


class MotionState(NamedTuple):
    """State of a chunk in a guidance branch.

    Attributes:
      accumulated: weighted distance since a token was computed.
      weights: of every token, within [floor, 1].
      computed_steps: of the coarse phase.
      fine: whether every token decides for itself.
      distance: what the measure keeps.
      last_frame: what the next chunk's first frame is compared with.
    """

    accumulated: Float[Array, "B L"]
    weights: Float[Array, "B L"]
    computed_steps: Int[Array, ""]
    fine: Bool[Array, ""]
    distance: Any
    last_frame: Float[Array, "B S Z"]


def motioncache(
    threshold: float | Array, distance: Distance, frames: int, config: MotionCacheConfig = SKYREELS
) -> TokenPolicy:
    """Computes the tokens whose weighted distances since they were computed add up to `threshold`.

    Args:
      threshold: tau; 0.1 with SkyReels-V2's time polynomial, 0.0065 with MAGI-1's embedded distance.
      distance: of a chunk's step to the one before.
      frames: of a chunk.
      config: all else; `SKYREELS`, `MAGI` and `PAPER` are the published variants.
    """

    def init(h, seen):
        shape = h.shape[:2]
        return MotionState(
            accumulated=jnp.zeros(shape, jnp.float32),
            weights=jnp.ones(shape, jnp.float32),
            computed_steps=jnp.zeros((), jnp.int32),
            fine=jnp.array(config.coarse == 0),
            distance=distance.init(h),
            last_frame=_frames(_feature(config, seen), frames)[:, -1],
        )

    def decide(state, step, h):
        change, kept = distance.measure(state.distance, step, h)
        weights = jnp.where(state.fine, state.weights, 1.0)
        accumulated = state.accumulated + weights * change
        full = step.index <= config.warmup
        if config.force_last:
            full |= step.last
        need = jnp.where(full, True, select(accumulated, threshold, frames, config, step.index))
        return Wanted(need, accumulated), state._replace(accumulated=accumulated, distance=kept)

    def observe(state, step, computed, seen, before):
        feature = _frames(_feature(config, seen), frames)
        counts = (step.index > config.warmup) & computed.any() & ~state.fine
        computed_steps = state.computed_steps + counts.astype(jnp.int32)
        if config.coarse_by == "computed":
            fine = state.fine | (computed_steps >= config.coarse)
        else:
            fine = step.index + 1 > config.warmup + config.coarse
        motion = _motion(config, feature, seen, step, before)
        weights = motion_weights(motion, config.floor, config.normalise)
        if config.first_frame == "one" and before is None:
            weights = weights.at[:, 0].set(1.0)
        return MotionState(
            accumulated=jnp.where(computed, 0.0, state.accumulated),
            weights=jnp.where(fine, weights.reshape(computed.shape), state.weights),
            computed_steps=computed_steps,
            fine=fine,
            distance=state.distance,
            last_frame=feature[:, -1],
        )

    return TokenPolicy(init, decide, observe)


def select(
    accumulated: Float[Array, "B L"],
    threshold: float | Array,
    frames: int,
    config: MotionCacheConfig,
    index: int | Array,
) -> Bool[Array, "B L"]:
    """The tokens that are to be computed at step `index` (equation 13, vote and least share of the authors' program)."""
    need = accumulated > threshold if config.strict else accumulated >= threshold
    if config.max_reuse is not None:
        share = jnp.asarray(config.max_reuse, jnp.float32)
        share = share[index] if share.ndim else share
        place = jnp.argsort(jnp.argsort(accumulated, axis=1), axis=1).astype(jnp.float32)
        need |= place >= share * accumulated.shape[1]
    if config.vote is not None:
        share = _frames(need, frames).astype(jnp.float32).mean(1, keepdims=True)
        need = jnp.broadcast_to(share > config.vote, (need.shape[0], frames, share.shape[-1])).reshape(need.shape)
    return need & (need.astype(jnp.float32).mean(1, keepdims=True) >= config.min_share)


def frame_motion(
    z: Float[Array, "B F S Z"], before: Float[Array, "B S Z"] | None, relative: bool
) -> Float[Array, "B F S"]:
    """Mean absolute difference to the frame before (equation 9), over its magnitude if `relative`.

    Without a frame before the first one it takes the motion of the second; a single frame has none.
    """
    z = z.astype(jnp.float32)
    first = z[:, :1] if before is None else before.astype(jnp.float32)[:, None]
    previous = jnp.concatenate([first, z[:, :-1]], axis=1)
    motion = jnp.abs(z - previous).mean(-1)
    if relative:
        motion = motion / (jnp.abs(previous).mean(-1) + 1e-8)
    if before is None and z.shape[1] > 1:
        motion = motion.at[:, 0].set(motion[:, 1])
    return motion


def motion_weights(
    motion: Float[Array, "B F S"], floor: float | Array, normalise: str = "minmax"
) -> Float[Array, "B F S"]:
    """Weights within [floor, 1] per frame (equation 10); 1 everywhere in a frame whose tokens all move alike."""
    high, low = motion.max(-1, keepdims=True), motion.min(-1, keepdims=True)
    alike = high - low <= 1e-6 * high
    if normalise == "max":
        low = jnp.zeros_like(low)
    share = (motion - low) / (high - low + 1e-8)
    return jnp.where(alike, 1.0, floor + (1 - floor) * jnp.clip(share, 0.0, 1.0))


def _frames(x: Array, frames: int) -> Array:
    return x.reshape(x.shape[0], frames, -1, *x.shape[2:])


def _feature(config: MotionCacheConfig, seen: Seen) -> Array:
    return getattr(seen, config.proxy) if isinstance(config.proxy, str) else seen.latent


def _motion(config: MotionCacheConfig, feature: Array, seen: Seen, step: Step, before: MotionState | None) -> Array:
    if not isinstance(config.proxy, str):
        return config.proxy(seen, step)
    return frame_motion(feature, None if before is None else before.last_frame, config.relative)
