"""A video denoiser cut where token caches attach: embed / trunk / head of one chunk that sees the chunks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.data.shapes import MovingField, field_mean
from jaxcomp.models.video_dit import ChunkKV, VideoDiT


class ChunkDenoiser(NamedTuple):
    """A network out = head(trunk(embed(x, t, cond))) of which parts of the trunk's tokens can be left out.

    Attributes:
      embed: `embed(params, x [B, L, C], t f32[B], cond) -> (h [B, L, D], c)`. Cheap.
      trunk: `trunk(params, h [B, T, D], c, caches, index) -> (h', cache)`: hidden states of the tokens `index` i32[B, T] of a
        chunk, or of all without one. `caches` are those of the chunks from the first to this one; this one's is returned
        with the rows of the tokens rewritten, before they attend to it.
      head: `head(params, h' [B, L, D], c) -> out [B, L, C]`. Cheap.
      cache: `cache(batch) -> pytree`: what a chunk that never ran leaves to the others, zeros.
      frames: frames of a chunk, F; L = F * S.
    """

    embed: Callable[[Any, Array, Array, Any], tuple[Array, Any]]
    trunk: Callable[..., tuple[Array, Any]]
    head: Callable[[Any, Array, Any], Array]
    cache: Callable[[int], Any]
    frames: int


def video_denoiser(model: VideoDiT) -> ChunkDenoiser:
    """A `VideoDiT`; cond is i32[B] labels or None. Its output is the velocity, its time the noise level in [0, 1]."""

    def call(method, params, *args):
        return model.apply({"params": params}, *args, method=method)

    def embed(params, x, t, cond):
        h, c = call("embed", params, x[:, None], t[:, None], cond)
        return h[:, 0], c

    def trunk(params, h, c, caches, index=None):
        h, cache = call("trunk", params, h[:, None], c, caches, index)
        return h[:, 0], cache

    def head(params, h, c):
        return call("head", params, h[:, None], c)[:, 0]

    def cache(batch):
        size = model.config
        shape = (size.depth, batch, size.chunk_tokens, size.heads, size.head_dim)
        return ChunkKV(*[jnp.zeros(shape, model.dtype)] * 3)

    return ChunkDenoiser(embed, trunk, head, cache, model.config.frames)


def field_denoiser(frames: int) -> ChunkDenoiser:
    """The exact velocity of a `MovingField`, which is `params`; tokens are independent, so chunks leave nothing."""

    def trunk(field, x, t, caches, index=None):
        del caches
        if index is not None:
            field = MovingField(jnp.take_along_axis(field.modes, index[:, :, None, None], 1), field.std)
        return (x - field_mean(field, x, t)) / t[:, None, None].astype(x.dtype), ()

    return ChunkDenoiser(
        embed=lambda field, x, t, cond: (x, t),
        trunk=trunk,
        head=lambda field, h, t: h,
        cache=lambda batch: (),
        frames=frames,
    )


def sequence_velocity(
    denoiser: ChunkDenoiser, params: Any, x: Float[Array, "B G L C"], t: Float[Array, "G"], cond: Any = None
) -> Float[Array, "B G L C"]:
    """Output of every chunk by one full forward each, from the first on: what the engine does in a row without reuse."""
    caches, outs = [], []
    for g in range(x.shape[1]):
        h, c = denoiser.embed(params, x[:, g], jnp.broadcast_to(t[g], x.shape[:1]), cond)
        h, cache = denoiser.trunk(params, h, c, (*caches, denoiser.cache(x.shape[0])), None)
        caches.append(cache)
        outs.append(denoiser.head(params, h, c))
    return jnp.stack(outs, 1)
