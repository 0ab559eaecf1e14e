"""Tiny auto-encoders of diffusion latents (TAESD family); TAEF2, that of FLUX.2, is `TinyEncoder()` and `TinyDecoder()`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

STRIDE = 8  # pixels per latent and axis
_STAGES = 3
_GROUPS = 4


def _conv(features: int, name: str, stride: int = 1, bias: bool = True) -> nn.Conv:
    padding = ((1, 1), (1, 1))  # both sides also where stride is 2
    return nn.Conv(features, (3, 3), (stride, stride), padding, use_bias=bias, name=name)


class Block(nn.Module):
    """relu(x + convs(x)) of three convolutions; with `pool` x first gets a group-normed bottleneck of its own added."""

    pool: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Same shape."""
        features = x.shape[-1]
        if self.pool:
            wide = nn.Conv(4 * features, (1, 1), use_bias=False, name="pool_expand")(x)
            wide = nn.relu(nn.GroupNorm(_GROUPS, epsilon=1e-5, name="pool_norm")(wide))
            x = x + nn.Conv(features, (1, 1), use_bias=False, name="pool_reduce")(wide)
        y = nn.relu(_conv(features, "conv_0")(x))
        y = nn.relu(_conv(features, "conv_1")(y))
        return nn.relu(x + _conv(features, "conv_2")(y))


class TinyEncoder(nn.Module):
    """Images to latents, eight times smaller. `pool`: bottlenecks in the blocks of the lowest resolution."""

    latent_channels: int = 32
    features: int = 64
    pool: bool = True

    @nn.compact
    def __call__(self, image: Float[Array, "N H W 3"]) -> Float[Array, "N H/8 W/8 C"]:
        """Latents of images in [0, 1].

        Raises:
          ValueError: height or width is not a multiple of 8.
        """
        if image.shape[1] % STRIDE or image.shape[2] % STRIDE:
            raise ValueError(f"image: expected multiples of {STRIDE} pixels, found {image.shape[1:3]}; crop or pad it")
        x = Block(name="block")(_conv(self.features, "stem")(image))
        for i in range(_STAGES):
            x = _conv(self.features, f"down_{i}", 2, bias=False)(x)
            for j in range(3):
                x = Block(self.pool and i == _STAGES - 1, name=f"block_{i}_{j}")(x)
        return _conv(self.latent_channels, "out")(x)


class TinyDecoder(nn.Module):
    """Latents to images, eight times larger. `pool`: bottlenecks in the blocks of the lowest resolution."""

    features: int = 64
    pool: bool = True

    @nn.compact
    def __call__(self, latents: Float[Array, "N h w C"]) -> Float[Array, "N 8*h 8*w 3"]:
        """Images, about [0, 1], not clipped."""
        x = nn.relu(_conv(self.features, "stem")(3 * jnp.tanh(latents / 3)))
        for i in range(_STAGES):
            for j in range(3):
                x = Block(self.pool and i == 0, name=f"block_{i}_{j}")(x)
            x = _conv(self.features, f"up_{i}", bias=False)(x.repeat(2, axis=1).repeat(2, axis=2))
        return _conv(3, "out")(Block(name="block")(x))
