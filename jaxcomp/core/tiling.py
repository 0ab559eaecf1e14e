"""A function of images on windows of a large image: bounded memory, one compiled shape, exact joints where possible."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxcomp.core.progress import track


class Span(NamedTuple):
    """One window along an axis, in input pixels: it starts at `start`, and its result is kept in [`first`, `last`)."""

    start: int
    first: int
    last: int


def spans(size: int, tile: int, overlap: int) -> tuple[int, list[Span]]:
    """(length of every window, windows); kept parts tile [0, size) and lie `overlap` from every cut of their window."""
    window = tile + 2 * overlap
    if size <= window:
        return size, [Span(0, 0, size)]
    start = lambda first: min(max(first - overlap, 0), size - window)
    return window, [Span(start(first), first, min(first + tile, size)) for first in range(0, size, tile)]


def tiled(
    fn: Callable[[np.ndarray], np.ndarray],
    image: Shaped[np.ndarray, "H W C"],
    *,
    scale: int,
    tile: int,
    overlap: int,
    multiple: int = 1,
) -> Shaped[np.ndarray, "scale*H scale*W c"]:
    """`fn` of the image, window by window; the windows are `tile + 2 * overlap` pixels wide.

    Equal to `fn` of the whole image where an output pixel depends on at most `overlap` pixels around its own, and on
    nothing outside the image but what `fn` itself puts there; otherwise an approximation that improves with `overlap`.

    Args:
      fn: [1, h, w, C] to [1, scale*h, scale*w, c]; called with one shape. It pads to `multiple` by reflection.
      image: on the host.
      scale: upscaling factor of `fn`.
      tile: kept pixels per window and axis.
      overlap: pixels around them.
      multiple: windows start at multiples of this.

    Raises:
      ValueError: tile or overlap are negative or no multiples of `multiple`.
    """
    if tile <= 0 or overlap < 0 or tile % multiple or overlap % multiple:
        expected = f"a positive tile and an overlap that are multiples of {multiple}"
        raise ValueError(f"expected {expected}, found tile {tile}, overlap {overlap}")
    height, width = image.shape[:2]
    padding = ((0, -height % multiple), (0, -width % multiple), (0, 0))
    image = np.pad(image, padding, mode="reflect") if multiple > 1 else image
    (h, rows), (w, columns) = (spans(size, tile, overlap) for size in image.shape[:2])
    result = None
    for row, column in track(list(itertools.product(rows, columns)), "tiles"):
        window = image[None, row.start : row.start + h, column.start : column.start + w]
        part = np.asarray(fn(window))[0]
        if result is None:
            result = np.empty((image.shape[0] * scale, image.shape[1] * scale, part.shape[-1]), part.dtype)
        inside = part[_kept(row, scale, row.start), _kept(column, scale, column.start)]
        result[_kept(row, scale), _kept(column, scale)] = inside
    return result[: height * scale, : width * scale]


def _kept(span: Span, scale: int, origin: int = 0) -> slice:
    return slice((span.first - origin) * scale, (span.last - origin) * scale)
