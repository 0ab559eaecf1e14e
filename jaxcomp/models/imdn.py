"""IMDN, the information multi-distillation network (Hui et al., 2019, arXiv 1909.11856), as NTIRE 2022 simplified it."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.sr_blocks import conv, leaky_relu, upsample


class IMDB(nn.Module):
    """Three times a quarter of the channels is set aside (distilled) and the rest refined; a 1x1 fuses all quarters."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Features of the same shape."""
        distilled, rest = [], x
        for i in range(3):
            y = leaky_relu(conv(self.channels, 3, name=f"conv_{i}")(rest))
            part, rest = jnp.split(y, [self.channels // 4], axis=-1)
            distilled.append(part)
        distilled.append(conv(self.channels // 4, 3, name="conv_3")(rest))
        return x + conv(self.channels, 1, name="fuse")(jnp.concatenate(distilled, axis=-1))


class IMDN(nn.Module):
    """The baseline of the NTIRE 2022 challenge, 893,936 parameters at x4; see `sr_blocks.SuperResolver`.

    Unlike the network of the paper it has 8 blocks, no contrast-aware channel attention and no concatenation of blocks.
    """

    channels: int = 64
    num_blocks: int = 8
    scale: int = 4
    data_range: float = 1.0
    min_size: ClassVar[int] = 1
    multiple: ClassVar[int] = 1

    @property
    def receptive_radius(self) -> int:
        """One pixel per 3x3 convolution on the longest path."""
        return 4 * self.num_blocks + 3

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N s*H s*W 3"]:
        """The upscaled image."""
        head = y = conv(self.channels, 3, name="head")(x)
        for i in range(self.num_blocks):
            y = IMDB(self.channels, name=f"blocks_{i}")(y)
        return upsample(conv(self.channels, 3, name="trunk")(y) + head, self.scale)
