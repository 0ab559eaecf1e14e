"""Upscales an image with a super-resolution network: the small one that ships with the package, or a published one.

    python -m experiments.upscale [--image=FILE] [--out=FILE.png] [--reference=FILE]
    python -m experiments.upscale --image=FILE --model=rlfn_x4 --weights=FILE.safetensors

Without an image it takes a photograph that ships with scikit-image, shrunk, and its truth as the reference. Writes a PNG and
beside it an HTML page that shows bicubic and the network side by side. Large images go through the network in tiles. Alpha is
resized by bicubic; grey stays grey, 16-bit grey stays 16 bits.
"""

import base64
import html
import io
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import flags
from jaxtyping import UInt, UInt8

from experiments import sr
from experiments.runs import launch
from jaxcomp.core.tiling import spans, tiled
from jaxcomp.core.transform import compress
from jaxcomp.data.bicubic import imresize
from jaxcomp.data.images import MAX_PIXELS, ImageError, Picture, check_png, read_image, read_rgb, write_image
from jaxcomp.deploy import cpu_convolutions
from jaxcomp.evaluate.restoration import psnr, restorer, ssim
from jaxcomp.io.files import replacing
from jaxcomp.io.super_resolution import PUBLISHED, SMALL, load_super_resolver
from jaxcomp.models.sr_blocks import SuperResolver
from pallas_kernels.convolution import build

_SMALL = "rlfn_small_x4"
_SAMPLE, _SAMPLE_SIZE = "astronaut", 384
_SHOWN = 480  # pixels of the result and axis that the page shows
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f6f7f9;max-width:1500px;margin:0 auto;padding:28px 20px}
h1{font-size:24px}td{padding:2px 24px 2px 0}td:first-child{color:#5b6776}
.row{display:flex;flex-wrap:wrap;gap:14px;margin:18px 0}figure{margin:0}figcaption{margin-bottom:6px;font-weight:600}
img{image-rendering:pixelated;display:block}
"""


class Job(NamedTuple):
    """What to upscale and how; see the flags."""

    image: pathlib.Path
    model: str
    weights: pathlib.Path
    out: pathlib.Path
    reference: pathlib.Path | None = None
    tile: int = 256
    overlap: int = 32
    max_pixels: int = MAX_PIXELS


def upscale(job: Job) -> dict[str, str]:
    """Runs the job, writes the PNG and the page, returns the facts that the page states.

    Raises:
      ImageError: an image cannot be used, or the output not be written; nothing is computed then.
      CheckpointError: the weights cannot be used.
    """
    check_outputs(job)
    picture = read_image(job.image, job.max_pixels)
    model, params = load_super_resolver(job.model, job.weights)
    reference = None if job.reference is None else read_reference(job.reference, picture, model.scale)
    start = time.perf_counter()
    params, form = for_this_machine(params)
    large = enlarge(picture, model, params, job.tile, job.overlap)
    seconds = time.perf_counter() - start
    shown = {"bicubic": bicubic(to_8_bits(picture.rgb), model.scale), job.model: to_8_bits(large.rgb)}
    facts = {
        "image": f"{job.image.name}, {describe(picture)}",
        "network": f"{job.model}, {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters",
        "result": f"{job.out.name}, {describe(large)}",
        "tiles": tiling_note(model, picture.rgb.shape, job),
        "time": f"{seconds:.1f} s with compilation, {jax.devices()[0].device_kind}",
        "convolution": form,
    }
    if reference is not None:
        facts |= compare(shown, reference, model.scale)
        shown["reference"] = reference
    write_image(job.out, large)
    with replacing(job.out.with_suffix(".html")) as temporary:
        temporary.write_text(page(facts, shown), encoding="utf-8")
    return facts


def check_outputs(job: Job) -> None:
    """Raises `ImageError` unless the PNG and the page can be written, and neither image that is read is lost by it."""
    check_png(job.out)
    for path in filter(None, (job.image, job.reference)):
        if job.out.exists() and path.exists() and job.out.samefile(path):
            raise ImageError(
                job.out, "another file than the images that are read", "one of them", "choose another --out"
            )
    if (written := job.out.with_suffix(".html")).is_dir():
        raise ImageError(written, "a file for the page", "a folder", "choose another --out")


def for_this_machine(params: Any) -> tuple[Any, str]:
    """The weights in the form that runs fastest here, and that form in words; builds the C++ kernel if it can."""
    if jax.default_backend() != "cpu":
        return params, "XLA"
    try:
        build()
        native, words = True, "C++, with what surrounds it"
    except RuntimeError as error:
        native, words = False, f"XLA, channels filled to whole vectors ({str(error).splitlines()[0]})"
    return compress(cpu_convolutions(native), params)[0], words


def sample(folder: pathlib.Path, scale: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a small photograph and its truth to the folder.

    Raises:
      ImageError: there is no scikit-image, or another file of the same name.
    """
    pair = sr.degrade(sr.centre(sr.bundled_images([_SAMPLE])[_SAMPLE], _SAMPLE_SIZE), scale)
    paths = folder / f"{_SAMPLE}.png", folder / f"{_SAMPLE}_true.png"
    for path, pixels in zip(paths, pair, strict=True):
        if path.exists() and not holds(path, pixels):
            raise ImageError(path, "no file but the sample's", "another file", "move it, or pass --image")
    for path, pixels in zip(paths, pair, strict=True):
        write_image(path, Picture(pixels))
    return paths


def holds(path: pathlib.Path, pixels: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Whether a file is an image of exactly these pixels."""
    try:
        return np.array_equal(read_rgb(path), pixels)
    except ImageError:
        return False


def read_reference(path: pathlib.Path, picture: Picture, scale: int) -> UInt8[np.ndarray, "H W 3"]:
    """The true large image; raises `ImageError` if it is not `scale` times as large as the picture."""
    reference = read_rgb(path)
    expected = tuple(scale * size for size in picture.rgb.shape[:2])
    if reference.shape[:2] != expected:
        size = lambda shape: f"{shape[1]} x {shape[0]} pixels"
        raise ImageError(path, size(expected), size(reference.shape), f"crop it to {scale} times the image")
    return reference


def bicubic(image: UInt[np.ndarray, "H W C"], scale: int) -> UInt[np.ndarray, "s*H s*W C"]:
    """MATLAB's bicubic in tiles, which is exact: it sees two pixels around each."""
    resize = lambda window: np.asarray(imresize(window[0], scale))[None]
    return tiled(resize, image, scale=scale, tile=256, overlap=4)


def enlarge(picture: Picture, model: SuperResolver, params, tile: int, overlap: int) -> Picture:
    """The picture through the network; alpha by bicubic, a grey picture by the mean of the three channels."""
    rgb = restorer(model, params, tile=tile, overlap=overlap)(picture.rgb)
    if picture.grey:
        mean = np.round(rgb.mean(axis=-1, keepdims=True)).astype(rgb.dtype)
        rgb = np.repeat(mean, 3, axis=-1)
    alpha = None if picture.alpha is None else bicubic(picture.alpha[..., None], model.scale)[..., 0]
    return Picture(rgb, alpha, picture.grey)


def describe(picture: Picture) -> str:
    """Size and kind in words."""
    height, width = picture.rgb.shape[:2]
    kind = ("grey" if picture.grey else "RGB") + (" with alpha" if picture.alpha is not None else "")
    return f"{width} x {height}, {kind}, {picture.rgb.dtype.itemsize * 8} bits"


def tiling_note(model: SuperResolver, shape: Sequence[int], job: Job) -> str:
    """How many tiles there were, and whether their joints are exact."""
    count = int(np.prod([len(spans(size, job.tile, job.overlap)[1]) for size in shape[:2]]))
    if count == 1:
        return "1: the whole image at once"
    radius = model.receptive_radius
    if radius is None:
        return f"{count}: an approximation, the network's attention would see the whole image"
    exact = "exact" if job.overlap >= radius else f"an approximation; --overlap={radius} would be exact"
    return f"{count}: {exact}"


def to_8_bits(image: UInt[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Rounded to 8 bits."""
    return image if image.dtype == np.uint8 else np.round(image / 257).astype(np.uint8)


def compare(results: Mapping[str, np.ndarray], reference: np.ndarray, border: int) -> dict[str, str]:
    """PSNR and SSIM of each result in the convention of papers."""
    facts = {"convention": f"Y of BT.601 studio range, uint8, border {border} px shaved"}
    for name, image in results.items():
        options = dict(border=border, channel="y")
        facts[name] = f"PSNR {psnr(image, reference, **options):.2f} dB, SSIM {ssim(image, reference, **options):.4f}"
    return facts


def page(facts: Mapping[str, str], images: Mapping[str, np.ndarray]) -> str:
    """One HTML page: facts, and the centre of every image side by side."""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    figures = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption><img alt='{html.escape(name)}' src='{_data_url(image)}'></figure>"
        for name, image in images.items()
    )
    head = f"<meta charset='utf-8'><title>Super-resolution</title><style>{_CSS}</style>"
    body = f"<h1>Super-resolution</h1><table>{rows}</table><div class='row'>{figures}</div>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def _data_url(image: np.ndarray) -> str:
    """PNG of the central pixels."""
    top, left = (max(0, (size - _SHOWN) // 2) for size in image.shape[:2])
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[top : top + _SHOWN, left : left + _SHOWN]).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_string("image", None, "Image to upscale; default: a photograph that ships with scikit-image.")
    flags.DEFINE_enum("model", _SMALL, list(PUBLISHED), "Network.")
    flags.DEFINE_string("weights", None, f"Its published tensors, safetensors; {_SMALL} ships with the package.")
    flags.DEFINE_string("out", None, "Output PNG; default: IMAGE_x<scale>.png in the working folder.")
    flags.DEFINE_string("reference", None, "The true large image: PSNR and SSIM are reported.")
    flags.DEFINE_integer("tile", 256, "Pixels per tile and axis, without overlap.", lower_bound=1)
    flags.DEFINE_integer("overlap", 32, "Pixels around each tile that the network also sees.", lower_bound=0)
    flags.DEFINE_integer("max_pixels", MAX_PIXELS, "Larger images are refused.", lower_bound=1)


def job_of(args: flags.FlagValues) -> Job:
    """What the flags ask for. Raises `ImageError` as `sample`, ValueError for a network without weights."""
    scale, folder = PUBLISHED[args.model].model().scale, pathlib.Path(args.out or ".").parent
    if args.weights is None and args.model != _SMALL:
        raise ValueError(f"--model={args.model} needs --weights=FILE.safetensors; only {_SMALL} ships with the package")
    image = args.image and pathlib.Path(args.image)
    reference = args.reference and pathlib.Path(args.reference)
    if image is None:
        image, reference = sample(folder, scale)
    out = pathlib.Path(args.out or f"{image.stem}_x{scale}.png")
    weights = pathlib.Path(args.weights or SMALL)
    return Job(image, args.model, weights, out, reference, args.tile, args.overlap, args.max_pixels)


def main(argv) -> None:
    """Upscales and says what was done; a bad input is one line, not a traceback."""
    del argv
    args = flags.FLAGS
    job = job_of(args)
    facts = upscale(job)
    for name, text in facts.items():
        print(f"{name:>11}: {text}")
    print(f"{'page':>11}: {job.out.with_suffix('.html')}")


if __name__ == "__main__":
    define_flags()
    launch(main)
