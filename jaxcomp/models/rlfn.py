"""RLFN, the residual local feature network (Kong et al., CVPRW 2022, arXiv 2205.07514)."""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from jaxcomp.models.sr_blocks import ESA, conv, leaky_relu, upsample


class RLFB(nn.Module):
    """Three 3x3 convolutions, a residual, a 1x1 convolution and spatial attention; nothing around the whole block."""

    channels: int
    mid: int
    esa_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Features of the same shape."""
        y = x
        for i, features in enumerate((self.mid, self.mid, self.channels)):
            y = leaky_relu(conv(features, 3, name=f"conv_{i}")(y))
        y = conv(self.channels, 1, name="fuse")(y + x)
        return ESA(self.esa_features, depth=1, name="esa")(y)


class RLFN(nn.Module):
    """RLFN; see `sr_blocks.SuperResolver`. The defaults are the x4 network of the paper, 543,740 parameters.

    Its published weights expect [0, 255]. The spatial attention is resized to the whole image, so every output pixel
    depends on all of it.
    """

    channels: int = 52
    mid: int = 52
    num_blocks: int = 6
    esa_features: int = 16
    scale: int = 4
    data_range: float = 255.0
    min_size: ClassVar[int] = 15
    multiple: ClassVar[int] = 1
    receptive_radius: ClassVar[None] = None

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N s*H s*W 3"]:
        """The upscaled image; raises ValueError below 15 x 15 pixels."""
        head = y = conv(self.channels, 3, name="head")(x)
        for i in range(self.num_blocks):
            y = RLFB(self.channels, self.mid, self.esa_features, name=f"blocks_{i}")(y)
        return upsample(conv(self.channels, 3, name="trunk")(y) + head, self.scale)


def rlfn_s(scale: int = 4) -> RLFN:
    """RLFN-S of the paper: 48 channels, 470,208 parameters at x4."""
    return RLFN(channels=48, mid=48, scale=scale)


def rlfn_ntire() -> RLFN:
    """The winner of the NTIRE 2022 runtime track: 4 blocks, trunk pruned from 48 to 46 channels, 317,218 parameters."""
    return RLFN(channels=46, mid=48, num_blocks=4)
