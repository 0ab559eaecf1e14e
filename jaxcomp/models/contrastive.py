"""The contrastive loss of RLFN (Kong et al., CVPRW 2022, arXiv 2205.07514): features of a shallow random network.

Deep features are semantic and spatially imprecise and cost PSNR; two random layers keep edges and texture. The width of
the extractor and the form of the loss are not published: 64 channels, as the first stage of VGG, and the ratio of the
works that the paper builds on (AECR-Net, CSD).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EPS, _LARGEST_RATIO = 1e-7, 10.0


class ShallowExtractor(nn.Module):
    """Conv 3x3 - Tanh - Conv 3x3, random (He et al., 2015) and never trained; tanh keeps what ReLU would cut off."""

    features: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> tuple[Float[Array, "N H-2 W-2 F"], Float[Array, "N H-4 W-4 F"]]:
        """The outputs of both layers, without padding."""
        options = dict(kernel_size=(3, 3), padding="VALID", kernel_init=nn.initializers.he_normal())
        first = jnp.tanh(nn.Conv(self.features, **options, name="conv_0")(x))
        return first, nn.Conv(self.features, **options, name="conv_1")(first)


def shallow_features(key: Array, features: int = 64) -> Callable[[Array], tuple[Array, Array]]:
    """A frozen `ShallowExtractor` as a function of images in [0, 1]."""
    extractor = ShallowExtractor(features)
    params = extractor.init(key, jnp.zeros((1, 5, 5, 3)))
    return lambda images: extractor.apply(params, images)


def contrastive_loss(
    extract: Callable[[Array], Sequence[Any]],
    anchor: Float[Array, "N H W 3"],
    positive: Float[Array, "N H W 3"],
    negative: Float[Array, "N H W 3"],
    form: Literal["ratio", "difference"] = "ratio",
) -> Float[Array, ""]:
    """Sum over layers j of d(phi_j(anchor), phi_j(positive)) / d(phi_j(anchor), phi_j(negative)), d the mean |a - b|.

    No gradient passes through positive and negative. A ratio is at most 10; "difference" subtracts instead. float32.

    Args:
      extract: images to features of several layers.
      anchor: output of the network.
      positive: the true image.
      negative: the bicubic upscaling of the input.
      form: how both distances are combined.
    """
    layers = [extract(image.astype(jnp.float32)) for image in (anchor, positive, negative)]
    total = jnp.zeros((), jnp.float32)
    for a, p, n in zip(*layers, strict=True):
        near, far = (jnp.mean(jnp.abs(a - jax.lax.stop_gradient(other))) for other in (p, n))
        total += near - far if form == "difference" else jnp.minimum(near / (far + _EPS), _LARGEST_RATIO)
    return total
