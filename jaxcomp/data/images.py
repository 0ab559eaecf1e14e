"""Image files as untrusted input: pictures in, PNG out; what cannot be kept exactly is refused with a reason."""

import os
import pathlib
import warnings
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt

from jaxcomp.io.files import replacing

MAX_PIXELS = 2**24
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
_COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"}
_GREY = {"1", "L", "LA"}


class ImageError(ValueError):
    """An image that cannot be used: file, what was expected, what was found, the remedy."""

    def __init__(self, file, expected: str, found: str, remedy: str):
        super().__init__(f"{file}: expected {expected}, found {found}; {remedy}")


class Picture(NamedTuple):
    """Pixels of uint8 or uint16; `alpha` is None for an opaque image; a `grey` one has three equal channels."""

    rgb: UInt[np.ndarray, "H W 3"]
    alpha: UInt[np.ndarray, "H W"] | None = None
    grey: bool = False


def read_image(path, max_pixels: int = MAX_PIXELS) -> Picture:
    """The first frame of an image file, turned as its EXIF says. Colour profiles are neither applied nor kept.

    Grey (also 16 bits), palette, RGB and CMYK images, with or without alpha, come as 8 bits but for 16-bit grey.

    Raises:
      ImageError: no file, damaged, not one of `FORMATS`, more than `max_pixels`, or a depth that would be cut.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ImageError(path, "an image file", "a folder" if path.is_dir() else "nothing", "check the path")
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(path, formats=FORMATS) as image:
            _check_size(path, image.size, max_pixels)
            _check_depth(path, image)
            return _picture(PIL.ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _too_large(path, str(error), max_pixels) from None
    except Exception as error:  # decoders raise all sorts of exceptions on damaged files
        found = f"{type(error).__name__}: {error}"
        raise ImageError(path, f"an undamaged image ({', '.join(FORMATS)})", found, "export it again") from error


def read_rgb(path) -> UInt[np.ndarray, "H W 3"]:
    """uint8 pixels of an opaque image; raises `ImageError` as `read_image`, and for alpha or 16 bits."""
    picture = read_image(path)
    if picture.alpha is not None or picture.rgb.dtype != np.uint8:
        raise ImageError(path, "8 bits without alpha", "16 bits or alpha", "flatten it to 8-bit RGB")
    return picture.rgb


def check_png(path) -> None:
    """Raises `ImageError` unless the path is that of a PNG in an existing folder that can be written."""
    path = pathlib.Path(path)
    flaws = {
        "another suffix": path.suffix.lower() != ".png",
        "a folder": path.is_dir(),
        f"no folder {path.parent}": not path.parent.is_dir(),
        "a folder without permission to write": path.parent.is_dir() and not os.access(path.parent, os.W_OK),
    }
    if found := next((flaw for flaw, holds in flaws.items() if holds), None):
        raise ImageError(path, "a .png file in an existing folder", found, "choose another output path")


def write_image(path, picture: Picture) -> None:
    """Writes a PNG, atomically; raises `ImageError` as `check_png`, and for 16-bit colour."""
    check_png(path)
    if picture.rgb.dtype == np.uint16 and not (picture.grey and picture.alpha is None):
        raise ImageError(path, "8 bits, or 16 bits of grey", "16 bits of colour", "convert it to 8 bits")
    with replacing(path) as temporary:
        PIL.Image.fromarray(_channels(picture)).save(temporary, format="PNG")


def _channels(picture: Picture) -> np.ndarray:
    colour = picture.rgb[..., :1] if picture.grey else picture.rgb
    planes = colour if picture.alpha is None else np.concatenate([colour, picture.alpha[..., None]], axis=-1)
    return planes[..., 0] if planes.shape[-1] == 1 else planes


def _picture(image: PIL.Image.Image) -> Picture:
    """Pixels of a decoded image."""
    grey = image.mode in _GREY or image.mode.startswith("I;16")
    transparent = "A" in image.mode or "transparency" in image.info
    if not image.mode.startswith("I;16"):
        image = image.convert(("LA" if grey else "RGBA") if transparent else ("L" if grey else "RGB"))
    pixels = np.atleast_3d(np.asarray(image))
    pixels = pixels.astype(np.uint16) if pixels.dtype.itemsize == 2 else pixels  # native byte order
    alpha = pixels[..., -1] if transparent else None
    return Picture(np.repeat(pixels[..., :1], 3, axis=-1) if grey else pixels[..., :3], alpha, grey)


def _check_size(path, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(path, f"{size[0]} x {size[1]}", max_pixels)


def _too_large(path, found: str, max_pixels: int) -> ImageError:
    return ImageError(path, f"at most {max_pixels} pixels", found, "crop it or raise the limit")


def _check_depth(path, image: PIL.Image.Image) -> None:
    """Pillow drops the low byte of 16-bit colour without a word; the raw mode of its decoder tells."""
    raw = "".join(str(tile.args) for tile in image.tile)
    known = image.mode in _COLOUR | _GREY or image.mode.startswith("I;16")
    if not known or (";16" in raw and not image.mode.startswith("I;16")):
        found = f"mode {image.mode}" if not known else f"16 bits of {image.mode}"
        raise ImageError(path, "8 bits, or 16 bits of grey", found, "convert it to 8 bits per channel")
