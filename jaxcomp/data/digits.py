"""Handwritten digits for image generation: the embedded 8 x 8 digits of UCI, and MNIST from its published files.

Embedded: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
doi 10.24432/C50P49, CC BY 4.0; the 1797 images of its test set, values 0..16.
"""

import functools
import gzip
import pathlib
import zlib
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8

from jaxcomp.data.text import ASSETS

NUM_CLASSES = 10
_HELD_OUT = 297  # images at the end of the embedded set
_MNIST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_MAX_BYTES = 100_000_000


class Labelled(NamedTuple):
    """Images in [-1, 1] and their classes."""

    images: Float[np.ndarray, "N H W 1"]
    labels: Int[np.ndarray, "N"]


@functools.cache
def digits(split: str) -> Labelled:
    """The embedded 8 x 8 digits: 'train' (1500), 'test' (297, of writers whom 'train' hardly has) or 'all'.

    Raises:
      ValueError: another split.
    """
    parts = {"train": slice(None, -_HELD_OUT), "test": slice(-_HELD_OUT, None), "all": slice(None)}
    if split not in parts:
        raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(parts)}")
    with np.load(ASSETS / "digits" / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"][parts[split]], file["labels"][parts[split]]
    return Labelled((images / 8 - 1).astype(np.float32)[..., None], labels.astype(np.int32))


def mnist(data_dir: str | pathlib.Path) -> Labelled:
    """MNIST's 10,000 test images, 28 x 28, from the two idx files of `data_dir/vision/mnist`.

    Raises:
      FileNotFoundError: a file is absent.
      ValueError: a file is damaged, or the two disagree.
    """
    paths = [pathlib.Path(data_dir, "vision", "mnist", name) for name in _MNIST]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels) or labels.max(initial=0) >= NUM_CLASSES:
        found = f"{len(labels)} labels up to {labels.max(initial=0)}"
        raise ValueError(
            f"{paths[1]}: expected {len(images)} labels below {NUM_CLASSES}, found {found}; fetch it again"
        )
    return Labelled((images / 127.5 - 1).astype(np.float32)[..., None], labels.astype(np.int32))


def read_idx(path: str | pathlib.Path, rank: int) -> UInt8[np.ndarray, "*shape"]:
    """The uint8 array of a gzipped idx file (magic 0 0 8 rank, big-endian sizes, data).

    Raises:
      FileNotFoundError: no file.
      ValueError: not such a file, or of another size than its header says.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a gzipped idx file, found nothing; set the data folder")
    try:
        with gzip.open(path) as file:
            raw = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzipped idx file, found {error}; fetch it again") from None
    start = 4 + 4 * rank
    if raw[:4] != bytes((0, 0, 8, rank)) or len(raw) < start:
        raise ValueError(f"{path}: expected an idx header of {rank} axes of bytes, found {raw[:4]!r}; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    size = int(np.prod(shape, dtype=object))
    if len(raw) != start + size:
        found = f"{len(raw) - start} bytes"
        raise ValueError(f"{path}: expected {size} bytes of data for shape {shape}, found {found}; fetch it again")
    return np.frombuffer(raw, np.uint8, size, start).reshape(shape)


def to_latents(images: Float[Array, "N H W 1"]) -> Float[Array, "N H/2 W/2 4"]:
    """Space to depth: every 2 x 2 square of pixels becomes the four channels of a latent."""
    return rearrange(images, "n (h p) (w q) 1 -> n h w (p q)", p=2, q=2)


def to_images(latents: Float[Array, "N h w 4"]) -> Float[Array, "N 2*h 2*w 1"]:
    """The inverse of `to_latents`."""
    return rearrange(latents, "n h w (p q) -> n (h p) (w q) 1", p=2, q=2)


def contact_sheet(images: Float[Array, "N H W 1"], columns: int = 10, zoom: int = 1) -> UInt8[np.ndarray, "h w 3"]:
    """Images in [-1, 1] as one RGB picture, dark strokes on white, row by row with a grey line between; every pixel `zoom` times.

    Raises:
      ValueError: the number of images is not a multiple of `columns`.
    """
    images = np.asarray(images, np.float32)
    if len(images) == 0 or len(images) % columns:
        raise ValueError(f"expected a multiple of {columns} images, found {len(images)}; choose other columns")
    grey = np.round(np.clip((1 - images) * 127.5, 0, 255)).astype(np.uint8).repeat(zoom, 1).repeat(zoom, 2)
    framed = np.pad(grey, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    return rearrange(framed, "(r c) h w 1 -> (r h) (c w) 1", c=columns).repeat(3, -1)
