"""A diffusion transformer that generates video chunk by chunk, every chunk at its own noise level.

Frames of a chunk see each other and all earlier chunks (block-causal attention), so the keys and values of earlier chunks
can be cached. The layout follows Wan (arXiv 2503.20314): one time projection of [6, D] for all blocks, to which every block
adds its own; adaLN-zero of DiT (Peebles & Xie, ICCV 2023, arXiv 2212.09748). The network predicts x0, from which the
velocity follows (Li & He, 2025, arXiv 2511.13720): wide patches need no wide trunk then.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxcomp.models.attention import dot_product_attention

_INIT = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`.

    `frames` are those of a chunk, of `size` x `size` pixels; a token is a patch of `patch` x `patch` pixels of a frame.
    `classes`: number of labels; label `classes` is "none". `min_time`: below it the velocity is not scaled up any more.

    Raises:
      ValueError: patches that do not tile a frame, or a head dimension that rotary embedding cannot split.
    """

    frames: int = 3
    size: int = 32
    patch: int = 4
    channels: int = 3
    width: int = 64
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 4
    classes: int = 3
    min_time: float = 0.05
    rope_theta: float = 100.0

    def __post_init__(self):
        if self.size % self.patch:
            raise ValueError(f"patches of {self.patch} do not tile {self.size} pixels; use a divisor")
        if self.width % self.heads or self.head_dim % 2 or self.head_dim < 8:
            found = f"width {self.width} over {self.heads} heads"
            raise ValueError(f"a head needs an even dimension of at least 8, found {found}")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def frame_tokens(self) -> int:
        """Tokens per frame, S."""
        return (self.size // self.patch) ** 2

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk, L = F * S."""
        return self.frames * self.frame_tokens

    @property
    def token_channels(self) -> int:
        """Numbers per token, C."""
        return self.channels * self.patch**2


class ChunkKV(NamedTuple):
    """Keys, values and queries of a chunk's last forward, rotated; with a leading axis for the layers."""

    key: Float[Array, "N B L H d"]
    value: Float[Array, "N B L H d"]
    query: Float[Array, "N B L H d"]


class Conditioning(NamedTuple):
    """What `trunk` and `head` need besides the hidden state."""

    x: Float[Array, "B K L C"]
    t: Float[Array, "B K"]
    embedding: Float[Array, "B K D"]
    modulation: Float[Array, "B K 6 D"]


def patchify(video: Float[Array, "B T H W c"], config: VideoDiTConfig) -> Float[Array, "B G L C"]:
    """Video of T = G * frames frames as tokens, chunk by chunk, frame by frame, row by row.

    Raises:
      ValueError: the frames have another size, or do not fill whole chunks.
    """
    c, (_, length, *frame) = config, video.shape
    if frame != [c.size, c.size, c.channels] or length % c.frames:
        expected = f"chunks of {c.frames} frames of shape {(c.size, c.size, c.channels)}"
        raise ValueError(f"expected {expected}, found {length} frames of shape {tuple(frame)}")
    return rearrange(video, "b (g f) (h p) (w q) c -> b g (f h w) (p q c)", f=c.frames, p=c.patch, q=c.patch)


def unpatchify(tokens: Float[Array, "B G L C"], config: VideoDiTConfig) -> Float[Array, "B T H W c"]:
    """Inverse of `patchify`."""
    sizes = dict(f=config.frames, h=config.size // config.patch, p=config.patch, q=config.patch)
    return rearrange(tokens, "b g (f h w) (p q c) -> b (g f) (h p) (w q) c", **sizes)


def rotary_angles(config: VideoDiTConfig, chunk: int) -> Float[np.ndarray, "L d/2"]:
    """Angles of every token of a chunk, radians: pairs of channels for time, then y, then x."""
    pairs, side = config.head_dim // 2, config.size // config.patch
    space = -(-pairs // 3)
    start = chunk * config.frames
    grid = np.meshgrid(np.arange(start, start + config.frames), *[np.arange(side)] * 2, indexing="ij")
    angles = []
    for position, count in zip(grid, (pairs - 2 * space, space, space), strict=True):
        frequency = config.rope_theta ** (-np.arange(count) / count)
        angles.append(position.reshape(-1, 1) * frequency)
    return np.concatenate(angles, 1).astype(np.float32)


def _turn(x: Float[Array, "B K T H d"], angle: Float[Array, "#B K T d/2"]) -> Float[Array, "B K T H d"]:
    cos, sin = jnp.cos(angle)[..., None, :].astype(x.dtype), jnp.sin(angle)[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _block_causal(attention_fn: Callable, query: Array, key: Array, value: Array) -> Array:
    """Attention of every chunk [B, K, T, H, d] to itself and the chunks before it; no masked score is computed."""
    flat = lambda x, chunks: x[:, :chunks].reshape(x.shape[0], -1, *x.shape[3:])
    chunks = range(query.shape[1])
    return jnp.stack([attention_fn(query[:, g], flat(key, g + 1), flat(value, g + 1)) for g in chunks], axis=1)


def write_tokens(old: Float[Array, "B L *R"], new: Float[Array, "B T *R"], index: Int[Array, "B T"] | None) -> Array:
    """`old` with the tokens of `index` replaced by `new`; all of them without an index."""
    if index is None:
        return new.astype(old.dtype)
    return jax.vmap(lambda o, n, i: o.at[i].set(n.astype(o.dtype), unique_indices=True))(old, new, index)


class Block(nn.Module):
    """One transformer block: modulated attention and MLP, each gated and added to the residual stream."""

    config: VideoDiTConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h, cache, modulation, angle, index):
        """(h', the chunk's new `ChunkKV` or None); h[B, K, T, D], cache = (own, earlier chunks) of one chunk or None."""
        c = self.config
        own = self.param("modulation", nn.initializers.zeros, (1, 1, 6, c.width)).astype(self.dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.moveaxis((modulation + own)[:, :, :, None], 2, 0)
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, kernel_init=_INIT, name=name)
        norm = lambda name: nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype, name=name)
        qkv = dense(3 * c.width, "qkv")(norm("attn_norm")(h) * (1 + scale) + shift)
        query, key, value = jnp.moveaxis(qkv.reshape(*h.shape[:3], 3, c.heads, c.head_dim), 3, 0)
        query, key = (nn.RMSNorm(dtype=self.dtype, name=n)(x) for n, x in (("q_norm", query), ("k_norm", key)))
        query, key = _turn(query, angle), _turn(key, angle)
        if cache is None:
            out, kv = _block_causal(self.attention_fn, query, key, value), None
        else:
            out, kv = self._attend_cached(query[:, 0], key[:, 0], value[:, 0], cache, index)
        h = h + gate * dense(c.width, "out")(out.reshape(h.shape))
        x = norm("mlp_norm")(h) * (1 + scale_mlp) + shift_mlp
        x = dense(c.width, "down")(nn.gelu(dense(c.mlp_ratio * c.width, "up")(x)))
        return h + gate_mlp * x, kv

    def _attend_cached(self, query, key, value, cache, index):
        own, past = cache
        kv = ChunkKV(*(write_tokens(old, new, index) for old, new in zip(own, (key, value, query), strict=True)))
        keys, values = (jnp.concatenate([*(getattr(p, n) for p in past), getattr(kv, n)], 1) for n in ("key", "value"))
        out = self.attention_fn(query, keys.astype(self.dtype), values.astype(self.dtype))
        return out[:, None], kv


class VideoDiT(nn.Module):
    """Velocity of flow matching, x_t = (1 - t) x0 + t n, for tokens of `patchify`; see the module's docstring.

    `attention_fn(query[B,T,H,d], key[B,S,H,d], value)` is Flax's. The blocks are stacked: one "blocks" subtree whose leaves
    lead with the layer.
    """

    config: VideoDiTConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        dense = lambda features, init=_INIT: nn.Dense(features, dtype=self.dtype, kernel_init=init)
        self.patch, self.time_in, self.time_out = dense(c.width), dense(c.width), dense(c.width)
        self.place = self.param("place", nn.initializers.normal(0.02), (c.frame_tokens, c.width))
        self.label = nn.Embed(c.classes + 1, c.width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02))
        self.modulation = dense(6 * c.width, nn.initializers.zeros)
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )
        self.blocks = scanned(c, self.attention_fn, self.dtype)
        self.head_norm = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)
        self.head_modulation = dense(2 * c.width, nn.initializers.zeros)
        self.out = dense(c.token_channels, nn.initializers.zeros)

    def __call__(
        self, x: Float[Array, "B G L C"], t: Float[Array, "B G"], label: Int[Array, "B"] | None = None
    ) -> Float[Array, "B G L C"]:
        """Velocity of all chunks at once; `t` in [0, 1] is each chunk's noise level."""
        h, c = self.embed(x, t, label)
        return self.head(self.trunk(h, c)[0], c)

    def embed(self, x, t, label=None) -> tuple[Float[Array, "B K L D"], Conditioning]:
        """Tokens x[B, K, L, C] at t[B, K] as hidden state and `Conditioning`; no label is the label "none"."""
        c, half = self.config, self.config.width // 2
        label = jnp.full(x.shape[:1], c.classes, jnp.int32) if label is None else label
        frequency = np.exp(-np.log(1e4) * np.arange(half) / half).astype(np.float32).reshape(1, 1, -1)
        angle = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(self.dtype)
        embedding = self.time_out(nn.silu(self.time_in(features))) + self.label(label)[:, None]
        modulation = self.modulation(nn.silu(embedding)).reshape(*t.shape, 6, c.width)
        place = jnp.tile(self.place.astype(self.dtype), (c.frames, 1))[None, None]
        return self.patch(x.astype(self.dtype)) + place, Conditioning(x, t, embedding, modulation)

    def trunk(
        self,
        h: Float[Array, "B K T D"],
        c: Conditioning,
        cache: tuple[ChunkKV, ...] | None = None,
        index: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B K T D"], ChunkKV | None]:
        """Hidden state after all blocks.

        Without a cache h holds all chunks from the first on. With one, h[B, 1, T, D] are tokens of the chunk whose
        `ChunkKV` is the last of `cache` (those at `index`, or all), the others being the chunks before it; their new
        keys and values are written before they attend, and the chunk's `ChunkKV` is returned.
        """
        chunks = range(h.shape[1]) if cache is None else (len(cache) - 1,)
        angle = jnp.stack([jnp.asarray(rotary_angles(self.config, g)) for g in chunks])[None]
        if index is not None:
            angle = angle[0, 0][index][:, None]
        layers = None if cache is None else (cache[-1], tuple(cache[:-1]))
        return self.blocks(h, layers, c.modulation, angle, index)

    def head(self, h: Float[Array, "B K L D"], c: Conditioning) -> Float[Array, "B K L C"]:
        """Velocity from the hidden state after the trunk."""
        shift, scale = jnp.split(self.head_modulation(nn.silu(c.embedding))[:, :, None], 2, -1)
        clean = self.out(self.head_norm(h) * (1 + scale) + shift)
        return (c.x - clean) / jnp.maximum(c.t, self.config.min_time)[:, :, None, None].astype(c.x.dtype)
