"""RFDN, the residual feature distillation network (Liu et al., 2020, arXiv 2009.11551)."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.sr_blocks import ESA, conv, leaky_relu, upsample


class RFDB(nn.Module):
    """Three shallow residual steps, each with a 1x1 distillation beside it, fused by a 1x1 and spatial attention."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Features of the same shape."""
        half, distilled = self.channels // 2, []
        for i in range(3):
            distilled.append(leaky_relu(conv(half, 1, name=f"distill_{i}")(x)))
            x = leaky_relu(conv(self.channels, 3, name=f"conv_{i}")(x) + x)
        distilled.append(leaky_relu(conv(half, 3, name="conv_3")(x)))
        y = conv(self.channels, 1, name="fuse")(jnp.concatenate(distilled, axis=-1))
        return ESA(self.channels // 4, depth=3, name="esa")(y)


class RFDN(nn.Module):
    """The second baseline of NTIRE 2022, 433,448 parameters at x4; see `sr_blocks.SuperResolver`.

    Its published weights expect [0, 255]. As in RLFN every output pixel depends on the whole image.
    """

    channels: int = 50
    num_blocks: int = 4
    scale: int = 4
    data_range: float = 255.0
    min_size: ClassVar[int] = 15
    multiple: ClassVar[int] = 1
    receptive_radius: ClassVar[None] = None

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N s*H s*W 3"]:
        """The upscaled image; raises ValueError below 15 x 15 pixels."""
        head = y = conv(self.channels, 3, name="head")(x)
        blocks = []
        for i in range(self.num_blocks):
            blocks.append(y := RFDB(self.channels, name=f"blocks_{i}")(y))
        y = leaky_relu(conv(self.channels, 1, name="merge")(jnp.concatenate(blocks, axis=-1)))
        return upsample(conv(self.channels, 3, name="trunk")(y) + head, self.scale)
