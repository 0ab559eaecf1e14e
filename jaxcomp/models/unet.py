"""U-Net of Stable Diffusion in plain Flax Linen: residual blocks, cross-attention, skip connections.

The trunk is a recursion over its skip connections: `inner_s` is all that lies below skip s, so that a cache which keeps the
output of `inner_1` (DeepCache's branch 0) runs the first and the last layer only.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.attention import dot_product_attention
from jaxcomp.models.dit import MLP, Around, direct, pure
from jaxcomp.models.positions import timestep_features

_PAD = ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`.

    Attributes:
      channels: of input and output.
      widths: features of each level; every level halves the resolution.
      layers: residual blocks per level on the way down; one more on the way up.
      attention: levels with a transformer block behind each residual block.
      num_heads: of its attention.
      text_size: features of the text that it attends to.
      groups: of all group norms.

    Raises:
      ValueError: lengths that do not fit each other.
    """

    channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: int = 8
    text_size: int = 768
    groups: int = 32

    def __post_init__(self):
        for name in ("widths", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.widths) != len(self.attention) or not self.widths:
            raise ValueError(f"expected one entry of attention per level, found {self.attention} for {self.widths}")
        if any(width % self.groups or width % self.num_heads for width in self.widths):
            raise ValueError(
                f"widths {self.widths} are not multiples of groups {self.groups} and heads {self.num_heads}"
            )

    @property
    def skips(self) -> int:
        """Number of skip connections: the first convolution, every layer, every downsampling."""
        return len(self.widths) * (self.layers + 1)

    def level(self, skip: int) -> int:
        """Level whose resolution a skip has before it is stored; the downsampling between two levels belongs to the upper."""
        return max(skip - 1, 0) // (self.layers + 1)

    def is_downsampling(self, skip: int) -> bool:
        """Whether the skip is the output of a downsampling."""
        return skip > 0 and skip % (self.layers + 1) == 0


class Condition(NamedTuple):
    """What all blocks see beside the image: the embedding of time [B, 4 widths[0]] and text [B, S, text_size]."""

    time: Float[Array, "B D"]
    text: Float[Array, "B S E"]


class ResBlock(nn.Module):
    """x + convolutions(x), the time embedding added between them."""

    features: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B D"]) -> Float[Array, "B H W features"]:
        """Same resolution."""
        norm = functools.partial(nn.GroupNorm, self.groups, epsilon=1e-5, dtype=self.dtype)
        conv = functools.partial(nn.Conv, self.features, dtype=self.dtype)
        y = conv((3, 3), padding=_PAD, name="conv_0")(nn.silu(norm(name="norm_0")(x)))
        y = y + nn.Dense(self.features, dtype=self.dtype, name="time")(nn.silu(time))[:, None, None]
        y = conv((3, 3), padding=_PAD, name="conv_1")(nn.silu(norm(name="norm_1")(y)))
        skip = x if x.shape[-1] == self.features else conv((1, 1), name="skip")(x)
        return skip + y


class CrossAttention(nn.Module):
    """Attention of x to a source; queries, keys and values have no bias."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], source: Float[Array, "B S E"]) -> Float[Array, "B L D"]:
        """One output per row of x."""
        dense = lambda name, bias=False: nn.Dense(x.shape[-1], bias, dtype=self.dtype, name=name)
        query, key, value = dense("q")(x), dense("k")(source), dense("v")(source)
        query, key, value = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (query, key, value))
        return dense("o", True)(dot_product_attention(query, key, value).reshape(x.shape))


class SpatialTransformer(nn.Module):
    """Self-attention over pixels, cross-attention to text and a gated MLP, added to the image."""

    config: UNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], text: Float[Array, "B S E"]) -> Float[Array, "B H W C"]:
        """Same shape."""
        c, features = self.config, x.shape[-1]
        norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, name=name)
        h = nn.GroupNorm(c.groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        h = nn.Conv(features, (1, 1), dtype=self.dtype, name="in")(h).reshape(x.shape[0], -1, features)
        y = norm("attn_norm")(h)
        h = h + CrossAttention(c.num_heads, self.dtype, name="attn")(y, y)
        h = h + CrossAttention(c.num_heads, self.dtype, name="cross")(norm("cross_norm")(h), text)
        up = nn.Dense(8 * features, dtype=self.dtype, name="up")(norm("mlp_norm")(h))
        value, gate = jnp.split(up, 2, axis=-1)
        h = h + nn.Dense(features, dtype=self.dtype, name="down")(value * nn.gelu(gate, approximate=False))
        return x + nn.Conv(features, (1, 1), dtype=self.dtype, name="out")(h.reshape(x.shape))


class Layer(nn.Module):
    """A residual block, a transformer where the level has one, and upsampling where a level ends."""

    config: UNetConfig
    features: int
    attention: bool
    upsample: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], c: Condition) -> Array:
        """Image of `features` channels."""
        x = ResBlock(self.features, self.config.groups, self.dtype, name="res")(x, c.time)
        if self.attention:
            x = SpatialTransformer(self.config, self.dtype, name="transformer")(x, c.text)
        if self.upsample:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = nn.Conv(self.features, (3, 3), padding=_PAD, dtype=self.dtype, name="conv")(x)
        return x


class UNet(nn.Module):
    """Noise or velocity predictor on latents; `around` of the trunk sees "inner_1", "inner_2", ... and "mid"."""

    config: UNetConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules; `down_s` makes skip s, `up_s` consumes it."""
        c, width = self.config, self.config.widths
        self.time = MLP(4 * width[0], 4 * width[0], nn.silu, self.dtype)
        self.stem = nn.Conv(width[0], (3, 3), padding=_PAD, dtype=self.dtype)
        self.down = [self._down(s) for s in range(1, c.skips)]
        self.mid = Layer(c, width[-1], True, dtype=self.dtype)
        self.mid_end = ResBlock(width[-1], c.groups, self.dtype)
        self.up = [self._up(s) for s in range(c.skips)]
        self.out_norm = nn.GroupNorm(c.groups, epsilon=1e-5, dtype=self.dtype)
        self.out = nn.Conv(c.channels, (3, 3), padding=_PAD, dtype=self.dtype)

    def _down(self, skip: int) -> nn.Module:
        c, level = self.config, self.config.level(skip)
        if c.is_downsampling(skip):
            return nn.Conv(c.widths[level], (3, 3), (2, 2), _PAD, dtype=self.dtype)
        return Layer(c, c.widths[level], c.attention[level], dtype=self.dtype)

    def _up(self, skip: int) -> Layer:
        c = self.config
        level = skip // (c.layers + 1)
        ends = level > 0 and skip % (c.layers + 1) == 0
        return Layer(c, c.widths[level], c.attention[level], ends, self.dtype)

    def __call__(self, x: Array, t: Array, cond: Array, around: Around = direct) -> Array:
        """Prediction for x: `head` of `trunk` of `embed`."""
        h, c = self.embed(x, t, cond)
        return self.head(self.trunk(h, c, around), c)

    def embed(
        self, x: Float[Array, "B H W C"], t: Float[Array, "B"], cond: Float[Array, "B S E"]
    ) -> tuple[Float[Array, "B H W D"], Condition]:
        """First convolution, and the condition of the blocks.

        Raises:
          ValueError: sizes that the levels do not halve evenly, other channels, or no text.
        """
        c, factor = self.config, 2 ** (len(self.config.widths) - 1)
        if x.ndim != 4 or x.shape[-1] != c.channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"x: expected [B, H, W, {c.channels}], H and W multiples of {factor}, found {x.shape}")
        if cond is None or cond.shape[::2] != (x.shape[0], c.text_size):
            found = None if cond is None else cond.shape
            raise ValueError(
                f"cond: expected text [{x.shape[0]}, tokens, {c.text_size}], found {found}; encode the prompt"
            )
        time = self.time(timestep_features(t, c.widths[0]).astype(self.dtype))
        return self.stem(x.astype(self.dtype)), Condition(time, cond.astype(self.dtype))

    def trunk(self, h: Float[Array, "B H W D"], c: Condition, around: Around = direct) -> Float[Array, "B H W D"]:
        """All layers, from the first skip down and up again."""
        down = [None, *(self._shared(module, c, s + 1) for s, module in enumerate(self.down))]
        up, mid, end = [pure(module) for module in self.up], pure(self.mid), pure(self.mid_end)

        def inner(skip: int, h: Array) -> Array:
            """From what lies above skip `skip` down to the bottom and up to where the skip is consumed."""
            kept = h if skip == 0 else down[skip](h)
            if skip + 1 < self.config.skips:
                deep = around(f"inner_{skip + 1}", functools.partial(inner, skip + 1), kept)
            else:
                deep = around("mid", lambda h: end(mid(h, c), c.time), kept)
            return up[skip](jnp.concatenate([deep, kept], axis=-1), c)

        return inner(0, h)

    def _shared(self, module: nn.Module, c: Condition, skip: int):
        run = pure(module)
        return run if self.config.is_downsampling(skip) else lambda h: run(h, c)

    def head(self, h: Float[Array, "B H W D"], c: Condition) -> Float[Array, "B H W C"]:
        """Prediction, shaped as the input."""
        del c
        return self.out(nn.silu(self.out_norm(h)))
