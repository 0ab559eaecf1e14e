"""DITN, a deployment-friendly super-resolution transformer (Liu et al., ACM MM 2023, arXiv 2308.02794).

What is unusual: the map is cut into patches once per UFONE, attention is between *channels* inside a patch, and the norm
before each linear map exists in three forms:
  "layer"   LayerNorm over channels, as in training;
  "tanh"    W tanh(x) + b with a full matrix W, which takes the place of LayerNorm at deployment (an approximation: the
            network is fine-tuned after `substitute_norm`);
  "merged"  tanh(x) alone: `merge_norm` moves W and b into the linear map that follows (exact).
"""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxcomp.models.sr_blocks import conv, upsample

Norm = Literal["layer", "tanh", "merged"]
_NORM_EPS = 1e-5
_CONSUMER = {"attn": "qkv", "spatial": "in", "mlp": "in"}  # the first linear map of each branch


class PreNorm(nn.Module):
    """The norm of a branch in one of its three forms."""

    kind: Norm

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Normalised x."""
        if self.kind == "layer":
            return nn.LayerNorm(_NORM_EPS, name="layer")(x)
        x = jnp.tanh(x)
        return conv(x.shape[-1], 1, name="mix")(x) if self.kind == "tanh" else x


def channel_attention(
    q: Float[Array, "N L C"], k: Float[Array, "N L C"], v: Float[Array, "N L C"], temperature: Float[Array, "1"]
) -> Float[Array, "N L C"]:
    """softmax(temperature * cos(q_c, k_d)) over d, applied to the channels of v.

    Norms are over the L pixels, at least 1e-12, and divide the product instead of its factors; the logits lie in
    [-|temperature|, |temperature|] and are float32.
    """
    inverse_norm = lambda x: jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1), 1e-24))
    gram = jnp.einsum("nlc,nld->ncd", q, k, preferred_element_type=jnp.float32)
    cosine = gram * inverse_norm(q)[:, :, None] * inverse_norm(k)[:, None, :]
    weights = nn.softmax(temperature.astype(jnp.float32)[:, None, None] * cosine, axis=-1)
    return jnp.einsum("ncd,nld->nlc", weights.astype(v.dtype), v)


class InnerPatchAttention(nn.Module):
    """Attention between the channels of a patch, one head, with a learned temperature."""

    @nn.compact
    def __call__(self, x: Float[Array, "N p p C"]) -> Float[Array, "N p p C"]:
        """Attended patches."""
        channels = x.shape[-1]
        qkv = nn.Dense(3 * channels, name="qkv")(x.reshape(x.shape[0], -1, channels))
        temperature = self.param("temperature", nn.initializers.ones, (1,))
        y = channel_attention(*jnp.split(qkv, 3, axis=-1), temperature)
        return conv(channels, 1, use_bias=False, name="out")(y.reshape(x.shape))


class SpatialAttention(nn.Module):
    """Large-kernel attention on the whole map: a gate from a 5x5 and a dilated 7x7 depthwise convolution, 23x23 in all."""

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """gamma * out(gate * attention), gamma initialised to zero."""
        channels = x.shape[-1]
        y, gate = jnp.split(conv(2 * channels, 1, name="in")(x), 2, axis=-1)
        y = conv(channels, 5, feature_group_count=channels, name="local")(y)
        y = conv(channels, 7, kernel_dilation=3, feature_group_count=channels, name="dilated")(y)
        y = conv(channels, 1, name="out")(gate * conv(channels, 1, name="mix")(y))
        gamma = self.param("gamma", nn.initializers.zeros, (channels,))
        return y * gamma[None, None, None]


class GatedFeedForward(nn.Module):
    """gelu(a) * b of a 1x1 and a 3x3 depthwise convolution; on patches the zero padding is at every patch border."""

    expansion: int
    use_bias: bool  # of the first convolution: only a merged norm leaves one

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Features of the same shape."""
        channels = x.shape[-1]
        wide = 2 * self.expansion * channels
        y = conv(wide, 1, use_bias=self.use_bias, name="in")(x)
        y = conv(wide, 3, feature_group_count=wide, use_bias=False, name="depthwise")(y)
        a, b = jnp.split(y, 2, axis=-1)
        return conv(channels, 1, use_bias=False, name="out")(nn.gelu(a, approximate=False) * b)


class Layer(nn.Module):
    """Pre-norm transformer layer: inner-patch attention ("attn") or spatial attention ("spatial"), then feed-forward."""

    branch: Literal["attn", "spatial"]
    expansion: int
    norm: Norm

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Features of the same shape."""
        attention = InnerPatchAttention if self.branch == "attn" else SpatialAttention
        x = x + attention(name=self.branch)(PreNorm(self.norm, name=f"{self.branch}_norm")(x))
        mlp = GatedFeedForward(self.expansion, use_bias=self.norm == "merged", name="mlp")
        return x + mlp(PreNorm(self.norm, name="mlp_norm")(x))


def unfold(x: Float[Array, "N H W C"], patch: int) -> Float[Array, "N*h*w p p C"]:
    """Patches that do not overlap, row by row."""
    return rearrange(x, "n (h p) (w q) c -> (n h w) p q c", p=patch, q=patch)


def fold(patches: Float[Array, "N*h*w p p C"], height: int, width: int) -> Float[Array, "N H W C"]:
    """Inverse of `unfold`."""
    patch = patches.shape[1]
    return rearrange(patches, "(n h w) p q c -> n (h p) (w q) c", h=height // patch, w=width // patch)


class DITN(nn.Module):
    """DITN; see `sr_blocks.SuperResolver`. Input and output lie in [0, 1].

    `num_units` UFONEs, each of `inner_layers` layers inside patches, `spatial_layers` on the whole map and, with
    `unit_conv`, one 3x3 convolution. LayerNorm's epsilon is 1e-5 (the authors' value is not published).
    """

    channels: int = 60
    num_units: int = 1
    inner_layers: int = 4
    spatial_layers: int = 4
    expansion: int = 2
    patch: int = 8
    scale: int = 4
    norm: Norm = "layer"
    unit_conv: bool = False
    data_range: ClassVar[float] = 1.0

    @property
    def multiple(self) -> int:
        """The patch size."""
        return self.patch

    @property
    def min_size(self) -> int:
        """The reflection that fills the last patch must be shorter than the image."""
        return self.patch // 2 + 1

    @property
    def receptive_radius(self) -> int:
        """Pixels: the own patch, 11 + 1 per spatial layer, 1 per 3x3 convolution; for windows aligned to patches."""
        return self.num_units * (self.patch - 1 + 12 * self.spatial_layers + self.unit_conv) + 3

    @nn.compact
    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N s*H s*W 3"]:
        """The upscaled image; raises ValueError for an image too small to fill its last patch by reflection."""
        height, width = x.shape[1:3]
        x = self._pad(x)
        head = y = conv(self.channels, 3, name="head")(x)
        for i in range(self.num_units):
            y = self._unit(y, f"units_{i}")
        y = upsample(conv(self.channels, 3, name="trunk")(y) + head, self.scale)
        return y[:, : height * self.scale, : width * self.scale]

    def _pad(self, x: Array) -> Array:
        height, width = x.shape[1:3]
        bottom, right = -height % self.patch, -width % self.patch
        if bottom >= height or right >= width:
            expected = f"at least {self.min_size} x {self.min_size} pixels"
            raise ValueError(
                f"DITN of patch {self.patch}: expected {expected}, found {height} x {width}; pad the image"
            )
        return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="reflect")

    def _unit(self, x: Array, name: str) -> Array:
        patches = unfold(x, self.patch)
        for i in range(self.inner_layers):
            patches = Layer("attn", self.expansion, self.norm, name=f"{name}_inner_{i}")(patches)
        y = fold(patches, *x.shape[1:3])
        for i in range(self.spatial_layers):
            y = Layer("spatial", self.expansion, self.norm, name=f"{name}_spatial_{i}")(y)
        return conv(self.channels, 3, name=f"{name}_conv")(y) if self.unit_conv else y


def ditn(scale: int = 4) -> DITN:
    """DITN: three UFONEs with a convolution at the end of each; layer counts are inferred from a figure, not published."""
    return DITN(num_units=3, unit_conv=True, scale=scale)


def ditn_tiny(scale: int = 4) -> DITN:
    """DITN-Tiny: one UFONE with LayerNorm; layer counts are inferred from DITN-Real, not published."""
    return DITN(scale=scale)


def ditn_real(scale: int = 4) -> DITN:
    """DITN-Real as released: one UFONE, tanh norm; 424,636, 432,751 or 444,112 parameters at x2, x3 or x4."""
    return DITN(scale=scale, norm="tanh")


def substitute_norm(params: dict) -> dict:
    """Params of the "tanh" form from those of the "layer" form: W = diag(scale), b = bias.

    Exact only where LayerNorm's (x - mean) / deviation equals tanh(x); fine-tune afterwards (section "deployment" of
    the paper).
    """
    flat = flatten_dict(params)
    norms = [path for path in flat if path[-2:] == ("layer", "scale")]
    for path in norms:
        prefix = path[:-2]
        scale, bias = flat.pop((*prefix, "layer", "scale")), flat.pop((*prefix, "layer", "bias"))
        flat[(*prefix, "mix", "kernel")] = jnp.diag(scale)[None, None]
        flat[(*prefix, "mix", "bias")] = bias
    return unflatten_dict(flat)


def merge_norm(params: dict) -> dict:
    """Params of the "merged" form from those of the "tanh" form: (tanh(x) W + b) V + c = tanh(x) (W V) + (b V + c)."""
    flat = flatten_dict(params)
    norms = [path[:-2] for path in flat if path[-2:] == ("mix", "kernel") and path[-3].endswith("_norm")]
    for *layer, norm in norms:
        branch = norm.removesuffix("_norm")
        consumer = (*layer, branch, _CONSUMER[branch])
        mix, bias = (flat.pop((*layer, norm, "mix", part)) for part in ("kernel", "bias"))
        kernel = flat[(*consumer, "kernel")]
        product = lambda left, kernel=kernel: jnp.matmul(
            left, kernel.reshape(kernel.shape[-2:]), precision=jax.lax.Precision.HIGHEST
        )
        old_bias = flat.get((*consumer, "bias"), jnp.zeros((), kernel.dtype))
        flat[(*consumer, "kernel")] = product(mix[0, 0]).reshape(kernel.shape)
        flat[(*consumer, "bias")] = product(bias) + old_bias
    return unflatten_dict(flat)
