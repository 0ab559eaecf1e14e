"""Every kind of image goes through the network or is refused before anything is written."""

import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict

from experiments.upscale import Job, bicubic, describe, sample, tiling_note, upscale
from jaxcomp.core import tiling
from jaxcomp.data.bicubic import imresize
from jaxcomp.data.images import ImageError, Picture, read_image, write_image
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.safetensors import save_safetensors
from jaxcomp.io.super_resolution import PUBLISHED, param_shapes
from jaxcomp.io.torch_layout import torch_name
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rlfn import RLFN

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (18, 21, 3), dtype=np.uint8)
GREY = np.repeat(RGB[..., :1], 3, axis=-1)
MODEL = "rlfn_ntire_x4"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random tensors of the smallest network, as it is published."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model, (names, _) = PUBLISHED[MODEL].model(), PUBLISHED[MODEL].names
    axes = {1: (0,), 4: (3, 2, 0, 1)}
    tensors = {
        torch_name(param, names): RNG.normal(0, 0.08, [leaf.shape[axis] for axis in axes[leaf.ndim]]).astype(np.float32)
        for param, leaf in flatten_dict(param_shapes(model), sep="/").items()
    }
    save_safetensors(path, tensors)
    return path


def png_of_16_bits(pixels):
    """A PNG written by hand: Pillow does not write 16-bit colour."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def truncate(path, percent):
    """The first part of a valid PNG."""
    PIL.Image.fromarray(RGB).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * percent // 100])


def job(tmp_path, weights, name="a.png", **options):
    return Job(tmp_path / name, MODEL, weights, tmp_path / "out.png", **options)


@pytest.mark.parametrize(
    "picture, kind",
    [
        (Picture(RGB), "84 x 72, RGB, 8 bits"),
        (Picture(RGB, RGB[..., 0]), "84 x 72, RGB with alpha, 8 bits"),
        (Picture(GREY, None, grey=True), "84 x 72, grey, 8 bits"),
        (Picture(GREY, RGB[..., 1], grey=True), "84 x 72, grey with alpha, 8 bits"),
        (Picture(GREY.astype(np.uint16) * 257, None, grey=True), "84 x 72, grey, 16 bits"),
        (Picture(RGB[:1, :1]), "4 x 4, RGB, 8 bits"),
    ],
)
def test_kinds_of_images_keep_their_kind(tmp_path, weights, picture, kind):
    write_image(tmp_path / "a.png", picture)
    facts = upscale(job(tmp_path, weights))
    found = read_image(tmp_path / "out.png")
    assert describe(found) == kind and facts["result"] == f"out.png, {kind}"
    if picture.alpha is not None:
        np.testing.assert_array_equal(found.alpha, np.asarray(imresize(picture.alpha[..., None], 4))[..., 0])
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count("<img") == 2 and text.count("data:image/png;base64,") == 2 and "317,218 parameters" in text


def test_reference_is_scored_and_shown(tmp_path, weights):
    write_image(tmp_path / "a.png", Picture(RGB))
    write_image(tmp_path / "r.png", Picture(np.asarray(imresize(RGB, 4))))
    facts = upscale(job(tmp_path, weights, reference=tmp_path / "r.png"))
    assert facts["bicubic"] == "PSNR inf dB, SSIM 1.0000" and float(facts[MODEL].split()[1]) < 40
    assert facts["convention"] == "Y of BT.601 studio range, uint8, border 4 px shaved"
    assert (tmp_path / "out.html").read_text(encoding="utf-8").count("<img") == 3


def test_file_names_cannot_inject_markup(tmp_path, weights):
    write_image(tmp_path / "<b>&.png", Picture(RGB))
    upscale(job(tmp_path, weights, "<b>&.png"))
    assert "&lt;b&gt;&amp;.png" in (tmp_path / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "found nothing"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n broken"), "undamaged image"),
        (lambda path: PIL.Image.new("F", (20, 20)).save(path, format="TIFF"), "mode F"),
        (lambda path: PIL.Image.new("RGB", (100, 100)).save(path), "at most 9999 pixels"),
        (lambda path: path.write_bytes(png_of_16_bits(RGB.astype(np.uint16) * 257)), "16 bits of RGB"),
        (lambda path: truncate(path, 60), "undamaged image"),
        (lambda path: path.mkdir(), "found a folder"),
    ],
)
def test_unusable_images_are_refused_and_nothing_is_written(tmp_path, weights, make, words):
    make(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ImageError, match=words):
        upscale(job(tmp_path, weights, max_pixels=9999))
    assert sorted(tmp_path.iterdir()) == before


def test_unusable_weights_reference_and_output_are_refused(tmp_path, weights):
    write_image(tmp_path / "a.png", Picture(RGB))
    write_image(tmp_path / "r.png", Picture(RGB))
    with pytest.raises(CheckpointError, match="pickled"):
        upscale(job(tmp_path, tmp_path / "w.pth"))
    with pytest.raises(ImageError, match="expected 84 x 72 pixels, found 21 x 18 pixels; crop it to 4 times"):
        upscale(job(tmp_path, weights, reference=tmp_path / "r.png"))
    with pytest.raises(ImageError, match=r"a \.png file in an existing folder"):
        upscale(job(tmp_path, weights)._replace(out=tmp_path / "out.jpg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "r.png"]


@pytest.mark.parametrize(
    "out, words",
    [
        ("a.png", "another file than the images that are read, found one of them; choose another --out"),
        ("link.png", "another file than the images that are read"),
        ("r.png", "another file than the images that are read"),
        ("folder.png", r"folder.png: expected a .png file in an existing folder, found a folder; choose another"),
        ("page.png", r"page.html: expected a file for the page, found a folder"),
        ("none/x.png", "found no folder .*none; choose another output path"),
        ("out.jpg", "found another suffix"),
    ],
)
def test_outputs_that_would_lose_something_are_refused(tmp_path, weights, out, words):
    write_image(tmp_path / "a.png", Picture(RGB))
    write_image(tmp_path / "r.png", Picture(np.asarray(imresize(RGB, 4))))
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "page.html").mkdir()
    state = lambda: {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    before = state()
    with pytest.raises(ImageError, match=words):
        upscale(job(tmp_path, weights, reference=tmp_path / "r.png")._replace(out=tmp_path / out))
    assert state() == before


@pytest.mark.parametrize("name", ["astronaut.png", "astronaut_true.png"])
def test_the_sample_replaces_no_other_file(tmp_path, name):
    (tmp_path / name).write_text("of the user")
    with pytest.raises(ImageError, match=f"{name}: expected no file but the sample's, found another file"):
        sample(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    assert sample(tmp_path, 4) == sample(tmp_path, 4)


def test_bicubic_in_tiles_is_exact():
    image = RNG.integers(0, 256, (530, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(bicubic(image, 2), imresize(image, 2))


def test_tiles_are_described_as_what_they_are(tmp_path):
    described = lambda model, size, **options: tiling_note(model, (size, size, 3), job(tmp_path, tmp_path, **options))
    assert described(RLFN(), 320) == "1: the whole image at once"
    assert described(RLFN(), 321).startswith("4: an approximation, the network's attention")
    assert described(IMDN(), 400, overlap=35) == "4: exact"
    assert described(IMDN(), 400) == "4: an approximation; --overlap=35 would be exact"


def test_tiles_bound_the_window_and_show_progress(tmp_path, weights, monkeypatch):
    write_image(tmp_path / "a.png", Picture(np.tile(RGB, (3, 3, 1))))
    shown = []
    track = tiling.track
    monkeypatch.setattr(tiling, "track", lambda items, label: shown.append((label, len(items))) or track(items, label))
    facts = upscale(job(tmp_path, weights, tile=24, overlap=8))
    assert facts["tiles"].startswith("9: an approximation") and ("tiles", 9) in shown
    assert describe(read_image(tmp_path / "out.png")) == "252 x 216, RGB, 8 bits"


def test_command_needs_no_downloads(tmp_path):
    command = [sys.executable, "-m", "experiments.upscale", f"--out={tmp_path / 'large.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "PSNR" in line]
    scored = {name.rstrip(":"): float(decibels) for name, _, decibels, *_ in lines}
    assert scored["rlfn_small_x4"] > scored["bicubic"] + 0.5
    assert describe(read_image(tmp_path / "large.png")) == "384 x 384, RGB, 8 bits"
    assert (tmp_path / "large.html").read_text(encoding="utf-8").count("<img") == 3
    refused = subprocess.run(
        [*command, "--model=rlfn_x4"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert refused.returncode == 1 and "upscale: --model=rlfn_x4 needs --weights" in refused.stderr


def test_published_network_on_a_real_image(tmp_path, data_dir):
    folder = data_dir / "sr"
    image, reference = (folder / "set5" / kind / "woman.png" for kind in ("LR_x4", "HR"))
    out = tmp_path / "woman.png"
    facts = upscale(Job(image, "rlfn_x4", folder / "weights" / "rlfn_x4.safetensors", out, reference))
    psnr = {name: float(facts[name].split()[1]) for name in ("bicubic", "rlfn_x4")}
    assert psnr["rlfn_x4"] == pytest.approx(30.72, abs=0.02) and psnr["bicubic"] == pytest.approx(26.47, abs=0.02)
