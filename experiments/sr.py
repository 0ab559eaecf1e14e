"""What experiments on super-resolution share: images, their degradation, patches, scores and times as rows of cards."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Float, UInt8

from experiments.cards import Card, Row
from jaxcomp.data.bicubic import imresize
from jaxcomp.data.images import FORMATS, ImageError, read_rgb
from jaxcomp.evaluate.restoration import Restoration, mod_crop, restoration
from jaxcomp.models.ditn import DITN
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import RLFN

Image = UInt8[np.ndarray, "H W 3"]
NETWORKS: Mapping[str, type[nn.Module]] = {"rlfn": RLFN, "rfdn": RFDN, "imdn": IMDN, "ditn": DITN}
SET5 = ("baby", "bird", "butterfly", "head", "woman")
TRAINING = (
    *("rocket", "motorcycle_left", "motorcycle_right", "hubble_deep_field", "immunohistochemistry"),
    *("camera", "brick", "gravel"),
)
EVALUATION = ("astronaut", "chelsea", "coffee")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


class Pair(NamedTuple):
    """A low-resolution image and its truth."""

    low: Image
    high: Image


def bundled_images(names: Sequence[str]) -> dict[str, Image]:
    """Images that ship inside scikit-image's wheel (`TRAINING`, `EVALUATION` or other names of `skimage.data`).

    Raises:
      ImageError: scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError as error:
        raise ImageError("scikit-image", "an installed package", "none", "install it, or pass --data_dir") from error
    stereo = dict(zip(("motorcycle_left", "motorcycle_right"), skimage.data.stereo_motorcycle(), strict=False))
    images = {name: stereo[name] if name in stereo else getattr(skimage.data, name)() for name in names}
    rgb = lambda image: image[..., :3] if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    return {name: rgb(image) for name, image in images.items()}


def folder_images(folder: str | pathlib.Path) -> dict[str, Image]:
    """All images of a folder by file name, 8 bits without alpha. Raises `ImageError` if there are none or one is bad."""
    files = sorted(path for path in pathlib.Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ImageError(folder, f"a folder of images ({', '.join(FORMATS)})", "none", "check --data_dir")
    return {path.name: read_rgb(path) for path in files}


def degrade(high: Image, scale: int) -> Pair:
    """MATLAB's bicubic at 1 / scale; the truth is cut to a multiple of the scale."""
    high = mod_crop(high, scale)
    return Pair(np.asarray(imresize(high, Fraction(1, scale))), high)


def data_folder(holds: str) -> pathlib.Path:
    """The folder of real data. Raises ValueError that says what it must hold if none is named."""
    if "JAXCOMP_DATA" not in os.environ:
        raise ValueError(f"set JAXCOMP_DATA to a folder that holds {holds}")
    return pathlib.Path(os.environ["JAXCOMP_DATA"])


def set5(data: pathlib.Path) -> list[tuple[str, Image, Image]]:
    """(name, low, high) of Set5 x4 from a data folder; the low images are the ones that are published with it."""
    read = lambda kind, name: read_rgb(data / "sr" / "set5" / kind / f"{name}.png")
    return [(name, read("LR_x4", name), read("HR", name)) for name in SET5]


def centre(image: Image, size: int) -> Image:
    """The central square of at most `size` pixels; all of the image for size 0."""
    top, left = (max(0, (length - size) // 2) if size else 0 for length in image.shape[:2])
    return image[top : top + size, left : left + size] if size else image


def patches(
    pairs: Sequence[Pair], scale: int, patch: int, batch: int, seed: int, start: int = 0
) -> Iterator[tuple[Float[np.ndarray, "B p p 3"], Float[np.ndarray, "B s*p s*p 3"]]]:
    """Endless batches of aligned random crops in [0, 1], each under one of the 8 symmetries of the square.

    Batch number i depends on `seed` and i alone, so that a run resumes at `start`. Pixels are equally likely: images are
    drawn in proportion to their number of positions.

    Raises:
      ValueError: an image is smaller than a patch.
    """
    positions = [tuple(size - patch + 1 for size in pair.low.shape[:2]) for pair in pairs]
    if min(map(min, positions)) < 1:
        raise ValueError(
            f"an image is smaller than a patch of {patch} x {patch} low-resolution pixels; shrink the patch"
        )
    share = np.array([height * width for height, width in positions], float)
    share /= share.sum()
    while True:
        rng = np.random.default_rng((seed, start))
        drawn = [_patch(pairs[i], positions[i], scale, patch, rng) for i in rng.choice(len(pairs), batch, p=share)]
        yield tuple(np.stack(part).astype(np.float32) / np.float32(255) for part in zip(*drawn, strict=True))
        start += 1


def _patch(pair: Pair, positions: tuple[int, int], scale: int, patch: int, rng: np.random.Generator) -> Pair:
    top, left = rng.integers(positions)
    turns, flipped = rng.integers(4), rng.integers(2)

    def cut(image: np.ndarray, factor: int) -> np.ndarray:
        window = image[top * factor : (top + patch) * factor, left * factor : (left + patch) * factor]
        return np.rot90(window[:, ::-1] if flipped else window, turns)

    return Pair(cut(pair.low, 1), cut(pair.high, scale))


def scores(
    restore: Callable[[Image], Image], pairs: Sequence[tuple[str, Image, Image]], scale: int
) -> list[Restoration]:
    """PSNR and SSIM of `restore(low)` against high on Y, then on RGB."""
    restored = [(name, restore(low), high) for name, low, high in pairs]
    return [restoration(lambda image: image, restored, border=scale, channel=channel) for channel in ("y", "rgb")]


def quality_rows(
    method: str,
    setting: str,
    score: Restoration,
    base: Restoration | None = None,
    paper: tuple[float | None, float | None] = (None, None),
) -> list[Row]:
    """PSNR and SSIM with a bootstrap interval of the mean over images, and the PSNR that is lost against `base`."""
    columns = [("psnr", "dB", score.psnrs, paper[0]), ("ssim", "", score.ssims, paper[1])]
    if base is not None:
        loss = {name: base.psnrs[name] - value for name, value in score.psnrs.items()}
        columns.append(("lost_psnr", "dB", loss, None))
    rows = []
    for metric, unit, values, published in columns:
        numbers = np.array(list(values.values()))
        means = np.random.default_rng(0).choice(numbers, (2000, len(numbers))).mean(axis=1)
        low, high = map(float, np.quantile(means, [0.025, 0.975]))
        fields = (f"{metric}_{score.channel}", unit, float(numbers.mean()), low, high, published)
        rows.append(Row(method, setting, *fields, f"psnr, ssim: {score.convention}; intervals over images"))
    return rows


def exact(metric: str, unit: str, value: float) -> tuple[str, str, float, float, float]:
    """Fields of a row whose value has no spread."""
    return metric, unit, value, value, value


def median_interval(values: Float[np.ndarray, "n"], resamples: int = 2000) -> tuple[float, float, float]:
    """(median, low, high): 95 % bootstrap interval, seed 0."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def cited_rows(folder: str | pathlib.Path, name: str, chosen: Callable[[Row], bool]) -> list[Row]:
    """Rows of another card of the folder, marked as such; none where that card has not been made."""
    path = pathlib.Path(folder) / f"{name}.json"
    if not path.exists():
        return []
    card = Card.from_json(path.read_text(encoding="utf-8"))
    source = f"from the card {name}, commit {card.commit}"
    note = lambda row: f"{row.note}; {source}" if row.note else source
    return [dataclasses.replace(row, note=note(row)) for row in card.rows if chosen(row)]
