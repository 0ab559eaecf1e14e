"""First-block cache and DBCache: the change that the first blocks make decides whether the middle ones run.

Hugging Face Diffusers (`FirstBlockCacheConfig`) and cache-dit (F_n B_m); no paper.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.sampling.denoiser import recut
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Decision, cached, residual


class Reference(NamedTuple):
    """Change by the first blocks at the last computed step; skipped steps in a row and in all."""

    change: Float[Array, "..."]
    run: Int[Array, ""]
    skipped: Int[Array, ""]


def first_blocks(
    threshold: Any, warmup: int = 0, max_run: int | None = None, max_skipped: int | None = None
) -> Decision:
    """Computes where the rel-L1 distance of the first blocks' change, c[1], to that of the last computed step passes a threshold.

    Args:
      threshold: rel-L1 above which the middle blocks run.
      warmup: steps that always compute.
      max_run: longest stretch of skipped steps.
      max_skipped: most skipped steps.
    """

    def init(h, c):
        return Reference(c[1], jnp.int32(0), jnp.int32(0))

    def decide(state, h, c, i) -> tuple[Bool[Array, ""], Reference]:
        size = jnp.abs(state.change).mean(dtype=jnp.float32)
        far = jnp.abs(c[1] - state.change).mean(dtype=jnp.float32) > threshold * size
        flag = far | (jnp.asarray(i) < max(warmup, 1))
        for count, most in ((state.run, max_run), (state.skipped, max_skipped)):
            flag = flag if most is None else flag | (count >= most)
        skip = jnp.where(flag, 0, 1).astype(jnp.int32)
        return flag, state._replace(run=(state.run + 1) * skip, skipped=state.skipped + skip)

    def observe(state, h, c, kept, i):
        return state._replace(change=c[1])

    return Decision(lambda steps: None, init, decide, observe)


def dbcache(threshold: Any, **options: Any) -> CachePolicy:
    """The policy, for a denoiser whose trunk was `recut`; `options` as in `first_blocks`."""
    return cached(first_blocks(threshold, **options), residual())


@dataclasses.dataclass(frozen=True)
class DBCacheConfig:
    """Dual-block cache.

    Attributes:
      first_blocks: F_n, blocks that always run and whose change is compared.
      last_blocks: B_n, blocks at the end that always run.
      threshold: see `first_blocks`.
      warmup_steps: steps that always compute.
      max_continuous_cached_steps: longest stretch of skipped steps.
      max_cached_steps: most skipped steps.
    """

    first_blocks: int = 8
    last_blocks: int = 0
    threshold: float = 0.08
    warmup_steps: int = 8
    max_continuous_cached_steps: int | None = None
    max_cached_steps: int | None = None

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        limits = dict(max_run=self.max_continuous_cached_steps, max_skipped=self.max_cached_steps)
        policy = dbcache(self.threshold, warmup=self.warmup_steps, **limits)
        return pipeline.replace(denoiser=recut(pipeline.denoiser, self.first_blocks, self.last_blocks), policy=policy)


def first_block_cache(threshold: float = 0.05) -> DBCacheConfig:
    """F1B0 without warm-up: the first-block cache."""
    return DBCacheConfig(first_blocks=1, threshold=threshold, warmup_steps=0)
