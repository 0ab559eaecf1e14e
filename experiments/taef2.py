"""Reconstruction of real images by the published TAEF2 auto-encoder; writes a result card.

    python -m experiments.taef2 --data_dir=$JAXCOMP_DATA [--out=experiments/results]

`--data_dir` holds vae/ and sr/set5/HR. Less than a minute on two CPU cores.
"""

import os
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from experiments.cards import Card, Row, current_commit, current_device
from experiments.runs import launch
from jaxcomp.data.images import read_rgb
from jaxcomp.evaluate.restoration import Image, Restoration, mod_crop, restoration, to_uint8
from jaxcomp.io.diffusion import load_taef2
from jaxcomp.models.vae import STRIDE

METHOD = "TAEF2, encoded and decoded"
DEPARTURES = (
    "The authors publish no PSNR. Images are cut at the bottom and right to multiples of 8 pixels; latents are 32 floats per "
    "8 x 8 pixels, six times fewer numbers than the image has.",
)


def reconstructor(data_dir: pathlib.Path) -> Callable[[Image], Image]:
    """uint8 images through the latents and back. Raises CheckpointError if a file is damaged."""
    files = [data_dir / "vae" / f"taef2_{part}.safetensors" for part in ("encoder", "decoder")]
    (encoder, encoder_params), (decoder, decoder_params) = load_taef2(*files)

    @jax.jit
    def run(x):
        latents = encoder.apply({"params": encoder_params}, x)
        return decoder.apply({"params": decoder_params}, latents)

    return lambda image: to_uint8(run(jnp.asarray(image[None], jnp.float32) / 255)[0], 1.0)


def score(data_dir: pathlib.Path) -> Restoration:
    """PSNR and SSIM over Set5, on RGB."""
    paths = sorted((data_dir / "sr" / "set5" / "HR").glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{data_dir}/sr/set5/HR: expected PNG images, found none; set --data_dir")
    images = [(path.stem, mod_crop(read_rgb(path), STRIDE)) for path in paths]
    return restoration(reconstructor(data_dir), [(name, x, x) for name, x in images], border=0, channel="rgb")


def rows(found: Restoration) -> list[Row]:
    """One row per image, and the mean with a bootstrap interval over images."""
    rng, out = np.random.default_rng(0), []
    for metric, unit, scores in (("PSNR-RGB", "dB", found.psnrs), ("SSIM-RGB", "", found.ssims)):
        values = np.array(list(scores.values()))
        means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        out.append(Row(METHOD, "Set5, mean", metric, unit, float(values.mean()), float(low), float(high)))
        out += [Row(METHOD, name, metric, unit, value, value, value) for name, value in scores.items()]
    return out


def main(argv) -> None:
    """Scores and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)
    started, f = time.monotonic(), flags.FLAGS
    found = score(pathlib.Path(f.data_dir))
    Card(
        name="taef2",
        paper="TAEF2, a tiny auto-encoder of FLUX.2 latents, from the TAESD repository (no paper)",
        command="python -m experiments.taef2 --data_dir=$JAXCOMP_DATA",
        commit=current_commit(),
        device=current_device(),
        minutes=(time.monotonic() - started) / 60,
        seeds=[0],
        rows=rows(found),
        departures=DEPARTURES,
    ).write(f.out)
    print(f"{f.out}/taef2.md")


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", os.environ.get("JAXCOMP_DATA", "."), "Folder that holds vae and sr.")
    flags.DEFINE_string("out", str(pathlib.Path(__file__).parent / "results"), "Where the card goes.")
    launch(main)
