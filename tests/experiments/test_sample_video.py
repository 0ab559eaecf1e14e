"""The script that draws videos: pictures, caches, one-line errors."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import sample_video
from jaxcomp.data.embedded_video import save_video_dit
from jaxcomp.models.video_dit import VideoDiT, VideoDiTConfig

CONFIG = VideoDiTConfig(frames=2, size=8, patch=4, width=16, depth=1, heads=2)
DEFAULTS = dict(
    shape="disc",
    videos=2,
    chunks=2,
    steps=8,
    given=True,
    moving_camera=False,
    cache="none",
    share=0.8,
    floor=0.3,
    seed=0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a model with random params."""
    folder = tmp_path_factory.mktemp("model")
    tokens = jax.ShapeDtypeStruct((1, 1, CONFIG.chunk_tokens, CONFIG.token_channels), np.float32)
    shapes = jax.eval_shape(VideoDiT(CONFIG).init, jax.random.key(0), tokens, np.ones((1, 1), np.float32))["params"]
    rng = np.random.default_rng(0)
    save_video_dit(folder, CONFIG, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape), shapes))
    return str(folder)


def run(model, path, **changes):
    sample_video.sample(types.SimpleNamespace(**(DEFAULTS | dict(model=model, out=str(path)) | changes)))


def test_pictures_and_a_cache_within_its_share(model, tmp_path, capsys):
    run(model, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (4 * 8 * 3, 2 * 8 * 3)  # frames across, videos down, three times their size
    run(model, tmp_path / "video.gif", cache="motioncache")
    with Image.open(tmp_path / "video.gif") as image:
        assert image.n_frames == 4 and image.size == (4 * 8 * 4, 8 * 4)  # each video and the full run's beside it
    said = capsys.readouterr().out
    assert 60 <= int(said.split("% of the tokens")[0].split()[-1]) <= 85 and "PSNR to the full run" in said
    with pytest.raises(ValueError, match=r"computes at least 6\d% of the tokens"):
        run(model, tmp_path / "video.gif", cache="motioncache", share=0.3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(out="video.mp4"), r"\.png or \.gif"),
        (dict(chunks=1), "with --given at least 2"),
        (dict(share=0.0), "--share in"),
        (dict(model="/nowhere"), "/nowhere/config.json"),
    ],
)
def test_bad_settings_are_explained(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**(dict(model=model, path=tmp_path / "out.png") | changes))
