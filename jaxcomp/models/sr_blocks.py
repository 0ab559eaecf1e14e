"""Blocks that super-resolution networks share: convolutions, pixel shuffle, enhanced spatial attention."""

from typing import Protocol

import flax.linen as nn
import jax
from einops import rearrange
from jaxtyping import Array, Float


class SuperResolver(Protocol):
    """What a caller needs to know of a network that maps [N, H, W, 3] to [N, scale*H, scale*W, 3].

    Attributes:
      scale: upscaling factor.
      data_range: input and output lie in [0, data_range].
      min_size: smallest height and width in pixels.
      multiple: the network pads height and width by reflection to a multiple of this.
      receptive_radius: an output pixel sees this many input pixels around its own; None if it sees all of them.
    """

    scale: int
    data_range: float
    min_size: int
    multiple: int
    receptive_radius: int | None


def conv(features: int, kernel: int, **options) -> nn.Conv:
    """Biased convolution with a square kernel; zero padding that keeps the size unless `options` say otherwise."""
    return nn.Conv(features, (kernel, kernel), **options)


def leaky_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """LeakyReLU of slope 0.05, the activation of IMDN, RFDN and RLFN."""
    return nn.leaky_relu(x, 0.05)


def pixel_shuffle(x: Float[Array, "N H W C*s*s"], scale: int) -> Float[Array, "N s*H s*W C"]:
    """Channel (c, i, j), j fastest, becomes channel c of pixel (scale*y + i, scale*x + j): PyTorch's order."""
    return rearrange(x, "n h w (c i j) -> n (h i) (w j) c", i=scale, j=scale)


class ESA(nn.Module):
    """Enhanced spatial attention: x * sigmoid(mask), the mask computed at about 1/6 of the resolution.

    RFDN (Liu et al., 2020, arXiv 2009.11551) has `depth` 3 convolutions after the pooling, RLFN (Kong et al., 2022,
    arXiv 2205.07514) keeps 1. The smallest input is 15 x 15.
    """

    features: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Raises ValueError for an input below 15 x 15 pixels."""
        if min(x.shape[1:3]) < 15:
            found = f"{x.shape[1]} x {x.shape[2]}"
            raise ValueError(f"{self.name}: expected at least 15 x 15 pixels, found {found}; pad the image")
        reduced = conv(self.features, 1, name="reduce")(x)
        y = conv(self.features, 3, strides=2, padding="VALID", name="stride")(reduced)
        y = nn.max_pool(nn.max_pool(y, (7, 1), (3, 1)), (1, 7), (1, 3))  # 7 x 7: a maximum is one of maxima
        for i in range(self.depth):
            y = conv(self.features, 3, name=f"pooled_{i}")(nn.relu(y) if i else y)
        y = jax.image.resize(y, reduced.shape, "bilinear", antialias=False)
        y = y + conv(self.features, 1, name="skip")(reduced)
        return x * nn.sigmoid(conv(x.shape[-1], 1, name="expand")(y))


def upsample(x: Float[Array, "N H W C"], scale: int) -> Float[Array, "N s*H s*W 3"]:
    """The tail of every network here: a 3x3 convolution and a pixel shuffle; call it inside a compact method."""
    return pixel_shuffle(conv(3 * scale**2, 3, name="upsample")(x), scale)
