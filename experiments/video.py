"""What the video experiments share: samples of a model as contact sheets and GIFs."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxcomp.data.shapes import random_scene, render
from jaxcomp.io.files import replacing
from jaxcomp.models.video_dit import VideoDiT, patchify, unpatchify
from jaxcomp.sampling.autoregressive import sample_chunks, staggered, video_denoiser
from jaxcomp.sampling.schedules import flow_grid
from jaxcomp.sampling.solvers import euler_flow


def to_bytes(video: Float[Array, "..."]) -> np.ndarray:
    """Values in [-1, 1] as uint8."""
    return np.asarray(jnp.clip(jnp.round((video + 1) * 127.5), 0, 255), np.uint8)


def contact_sheet(videos: Float[Array, "B T H W c"], scale: int = 3) -> Image.Image:
    """One row per video, one column per frame."""
    frames = to_bytes(videos)
    batch, length, height, width, _ = frames.shape
    sheet = Image.fromarray(frames.transpose(0, 2, 1, 3, 4).reshape(batch * height, length * width, -1))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def save_gif(path: pathlib.Path, videos: Float[Array, "B T H W c"], scale: int = 4, milliseconds: int = 120) -> None:
    """All videos side by side, looping."""
    frames = to_bytes(videos).transpose(1, 2, 0, 3, 4)  # [T H B W c]
    sheets = [Image.fromarray(frame.reshape(frame.shape[0], -1, frame.shape[-1])) for frame in frames]
    sheets = [s.resize((s.width * scale, s.height * scale), Image.Resampling.NEAREST) for s in sheets]
    with replacing(path) as temporary:
        sheets[0].save(
            temporary, "GIF", save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0, optimize=False
        )


def save_png(path: pathlib.Path, image: Image.Image) -> None:
    """Writes a PNG, atomically."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def write_sheet(stem: pathlib.Path, model: VideoDiT, params: dict, chunks: int, steps: int, shift: float = 3.0) -> None:
    """Samples as `stem`.png and .gif: four from noise, four that go on with a given chunk."""
    size, denoiser = model.config, video_denoiser(model)
    scene = random_scene(jax.random.key(7), 4, size.size)
    given = patchify(render(scene, size.frames, size.size), size)
    noise = jax.random.normal(jax.random.key(8), (2, 4, chunks, size.chunk_tokens, size.token_channels))
    solver = euler_flow(flow_grid(steps, shift, time_scale=1.0))
    videos = []
    for prefix, start in enumerate((noise[0], noise[1].at[:, 0].set(given[:, 0]))):
        schedule = staggered(chunks, steps, steps // 3, prefix)
        run = jax.jit(lambda p, x, s=schedule: sample_chunks(denoiser, p, x, scene.kind, solver, s)[0])
        videos.append(unpatchify(run(params, start), size))
    videos = jnp.concatenate(videos)
    save_png(stem.with_suffix(".png"), contact_sheet(videos))
    save_gif(stem.with_suffix(".gif"), videos)
