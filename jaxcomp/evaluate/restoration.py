"""PSNR and SSIM of restored images in the conventions of the super-resolution literature; numpy float64 throughout.

"y": luma of BT.601 in studio range, as the tables of papers; "rgb": all three channels, as the NTIRE challenges. The two
differ by 1.3 to 2.5 dB: never compare across them. Both are taken from uint8 images with the border shaved.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8

from jaxcomp.core.apply import compressed
from jaxcomp.core.progress import track
from jaxcomp.core.tiling import tiled
from jaxcomp.deploy import fuse_convolutions
from jaxcomp.models.sr_blocks import SuperResolver

Channel = Literal["y", "rgb"]
Image = UInt8[np.ndarray, "H W 3"]
_PEAK = 255.0
_SIGMA, _RADIUS = 1.5, 5


def to_uint8(image, data_range: float) -> UInt8[np.ndarray, "*shape"]:
    """Clips to [0, data_range], scales to 255 and rounds half to even, as the challenge code does."""
    image = np.clip(np.asarray(image, np.float32), 0, data_range)
    return np.round(image * np.float32(_PEAK / data_range)).astype(np.uint8)


def luma(image: Image) -> Float[np.ndarray, "H W"]:
    """Y of MATLAB's `rgb2ycbcr`, in [16, 235], not rounded."""
    return image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def mod_crop(image: np.ndarray, scale: int) -> np.ndarray:
    """The image cut at the bottom and right to a multiple of `scale` pixels."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def psnr(a: Image, b: Image, *, border: int, channel: Channel) -> float:
    """20 log10(255 / RMSE) in dB over pixels (and channels); inf for equal images. Raises ValueError as `_planes` says."""
    a, b = _planes(a, b, border, channel)
    mse = np.mean((a - b) ** 2)
    return float(20 * np.log10(_PEAK / np.sqrt(mse))) if mse else float("inf")


def ssim(a: Image, b: Image, *, border: int, channel: Channel) -> float:
    """Structural similarity (Wang et al., 2004): 11 x 11 Gaussian of sigma 1.5, valid windows, mean over channels.

    Raises:
      ValueError: as `_planes`, or fewer than 11 x 11 pixels are left.
    """
    a, b = _planes(a, b, border, channel)
    if min(a.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(f"SSIM needs 11 x 11 pixels inside the border, found {a.shape[0]} x {a.shape[1]}")
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (var_a + var_b + c2)))


def _planes(a: Image, b: Image, border: int, channel: Channel) -> tuple[np.ndarray, np.ndarray]:
    """Both images in float64 [H, W, C], border removed.

    Raises:
      ValueError: shapes differ, an image is not uint8 [H, W, 3], nothing is left, or the channel is unknown.
    """
    for image in (a, b):
        if image.shape != a.shape or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            found = f"{a.dtype} {a.shape} and {b.dtype} {b.shape}"
            raise ValueError(f"expected two uint8 images [H, W, 3] of one size, found {found}; use to_uint8, mod_crop")
    if min(a.shape[:2]) <= 2 * border:
        raise ValueError(f"a border of {border} leaves nothing of {a.shape[0]} x {a.shape[1]} pixels")
    if channel not in ("y", "rgb"):
        raise ValueError(f"channel {channel!r} is unknown; expected 'y' or 'rgb'")
    inside = slice(border, -border or None)
    convert = (lambda x: luma(x)[..., None]) if channel == "y" else (lambda x: x.astype(np.float64))
    return convert(a)[inside, inside], convert(b)[inside, inside]


@functools.cache
def _window() -> Float[np.ndarray, "11"]:
    window = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    return window / window.sum()


def _blur(x: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H-10 W-10 C"]:
    for _ in range(2):  # rows, then columns
        rows = x.shape[0] - 2 * _RADIUS
        x = sum(w * x[i : i + rows] for i, w in enumerate(_window())).swapaxes(0, 1)
    return x


@dataclasses.dataclass(frozen=True)
class Restoration:
    """Scores of every image by name; the means are those of the per-image values."""

    channel: Channel
    border: int
    psnrs: dict[str, float]
    ssims: dict[str, float]

    @property
    def psnr(self) -> float:
        """Mean PSNR, dB."""
        return float(np.mean(list(self.psnrs.values())))

    @property
    def ssim(self) -> float:
        """Mean SSIM."""
        return float(np.mean(list(self.ssims.values())))

    @property
    def convention(self) -> str:
        """How the numbers were taken, to print beside them."""
        channel = {"y": "Y of BT.601 studio range", "rgb": "RGB"}[self.channel]
        return f"{channel}, uint8, border {self.border} px shaved, mean over {len(self.psnrs)} images"


def restoration(
    restore: Callable[[Image], Image],
    pairs: Iterable[tuple[str, Image, Image]],
    *,
    border: int,
    channel: Channel,
) -> Restoration:
    """Scores `restore(low)` against `high` for every (name, low, high)."""
    psnrs, ssims = {}, {}
    for name, low, high in track(list(pairs), "restoration"):
        restored = restore(low)
        psnrs[name] = psnr(restored, high, border=border, channel=channel)
        ssims[name] = ssim(restored, high, border=border, channel=channel)
    return Restoration(channel, border, psnrs, ssims)


def restorer(
    model: SuperResolver, params: Any, *, tile: int | None = None, overlap: int = 32
) -> Callable[[UInt[np.ndarray, "H W 3"]], UInt[np.ndarray, "s*H s*W 3"]]:
    """The network as a function of uint8 or uint16 images; `params` may hold compressed leaves; C++ convolutions are fused.

    Images below the network's smallest size are filled by their edge pixels. `tile`: see `core.tiling.tiled`; without
    it the image is passed whole, and every image size is compiled.
    """

    @jax.jit
    def run(params, image: UInt[Array, "1 H W 3"]) -> UInt[Array, "1 s*H s*W 3"]:
        levels = jnp.iinfo(image.dtype).max
        x = image.astype(jnp.float32) * (model.data_range / levels)
        y = fuse_convolutions(compressed(model.apply))({"params": params}, x) * (levels / model.data_range)
        return jnp.round(jnp.clip(y, 0, levels)).astype(image.dtype)

    def restore(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        fill = [(0, max(0, model.min_size - size)) for size in (height, width)]
        padded = np.pad(image, (*fill, (0, 0)), mode="edge")
        part = functools.partial(run, params)
        if tile is None:
            result = np.asarray(part(padded[None]))[0]
        else:
            result = tiled(part, padded, scale=model.scale, tile=tile, overlap=overlap, multiple=model.multiple)
        return result[: height * model.scale, : width * model.scale]

    return restore
