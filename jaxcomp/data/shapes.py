"""Procedural video: shapes that move over a smooth background under a moving camera; and a field of moving tokens whose
denoiser is known exactly.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KINDS = ("disc", "square", "triangle")
_MAX_SHAPES, _WAVES = 2, 2


class Scene(NamedTuple):
    """What a batch of videos shows. Lengths are pixels, velocities pixels per frame, colours in [-1, 1], (y, x) order.

    Attributes:
      kind: index into `KINDS`, of all shapes of the video.
      centre: of each shape in frame 0.
      velocity: of each shape over the background.
      radius: of each shape; 0 where the video has fewer.
      colour: of each shape.
      camera: velocity of the camera; the background moves by its opposite.
      wave: wave vectors of the background, radians per pixel.
      phase: of each wave, radians.
      ground: mean colour of the background.
      swing: colour amplitude of each wave.
    """

    kind: Int[Array, "B"]
    centre: Float[Array, "B N 2"]
    velocity: Float[Array, "B N 2"]
    radius: Float[Array, "B N"]
    colour: Float[Array, "B N 3"]
    camera: Float[Array, "B 2"]
    wave: Float[Array, "B W 2"]
    phase: Float[Array, "B W"]
    ground: Float[Array, "B 3"]
    swing: Float[Array, "B W 3"]


def random_scene(key: Array, batch: int, size: int, moving_camera: float = 0.5) -> Scene:
    """Scenes of one or two shapes for frames of `size` x `size` pixels.

    Args:
      key: of all that is random.
      batch: B, at least 1.
      size: of the frames; shapes are scaled to it.
      moving_camera: probability that the camera moves.

    Raises:
      ValueError: an empty batch, or frames of less than 8 pixels.
    """
    if batch < 1 or size < 8:
        raise ValueError(f"expected a batch of at least 1 and frames of at least 8 pixels, found {batch} and {size}")
    keys = dict(zip(Scene._fields, jax.random.split(key, len(Scene._fields)), strict=True))
    uniform = lambda name, shape, low, high: jax.random.uniform(keys[name], (batch, *shape), minval=low, maxval=high)
    shapes, unit = _MAX_SHAPES, size / 32.0
    radius = uniform("radius", (shapes,), 4.0 * unit, 6.0 * unit)
    several = jax.random.bernoulli(jax.random.fold_in(keys["radius"], 1), 0.5, (batch, 1))
    pans = jax.random.bernoulli(jax.random.fold_in(keys["camera"], 1), moving_camera, (batch, 1))
    return Scene(
        kind=jax.random.randint(keys["kind"], (batch,), 0, len(KINDS)),
        centre=uniform("centre", (shapes, 2), 6.0 * unit, size - 6.0 * unit),
        velocity=_directions(keys["velocity"], (batch, shapes), 0.5 * unit, 1.75 * unit),
        radius=jnp.where(several | (jnp.arange(shapes)[None] == 0), radius, 0.0),
        colour=_hues(uniform("colour", (shapes,), 0.0, 1.0)),
        camera=jnp.where(pans, _directions(keys["camera"], (batch,), 0.4 * unit, 1.0 * unit), 0.0),
        wave=_directions(keys["wave"], (batch, _WAVES), math.pi / size, 2.5 * math.pi / size),
        phase=uniform("phase", (_WAVES,), 0.0, 2 * math.pi),
        ground=uniform("ground", (3,), -0.9, 0.0),
        swing=uniform("swing", (_WAVES, 3), -0.3, 0.3),
    )


def render(scene: Scene, frames: int, size: int) -> Float[Array, "B T H W 3"]:
    """The first `frames` frames, antialiased; shapes bounce off the border. Values in [-1, 1]."""
    time = jnp.arange(frames, dtype=jnp.float32)
    middle = jnp.arange(size, dtype=jnp.float32) + 0.5
    pixel = jnp.stack(jnp.meshgrid(middle, middle, indexing="ij"), -1)  # [H W 2]
    place = pixel[None, None] + (scene.camera[:, None] * time[None, :, None])[:, :, None, None]  # [B T H W 2]
    angle = jnp.einsum("bthwd,bnd->bthwn", place, scene.wave) + scene.phase[:, None, None, None]
    video = scene.ground[:, None, None, None] + jnp.einsum("bthwn,bnc->bthwc", jnp.cos(angle), scene.swing)
    for n in range(scene.radius.shape[1]):
        drift = (scene.velocity[:, n] - scene.camera)[:, None] * time[None, :, None]
        radius = scene.radius[:, n, None]
        centre = _bounce(scene.centre[:, n, None] + drift, radius[..., None], size - radius[..., None])
        offset = pixel[None, None] - centre[:, :, None, None]
        cover = jnp.clip(0.5 - _distance(scene.kind, offset, scene.radius[:, n]), 0.0, 1.0)
        cover = jnp.where((radius > 0)[:, :, None, None], cover, 0.0)[..., None]
        video = video * (1 - cover) + scene.colour[:, n, None, None, None] * cover
    return jnp.clip(video, -1.0, 1.0)


def _directions(key: Array, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*S 2"]:
    """Vectors of random direction and of length between `low` and `high`."""
    angle, length = jax.random.uniform(key, (2, *shape))
    angle, length = 2 * math.pi * angle, low + (high - low) * length
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1) * length[..., None]


def _hues(hue: Float[Array, "*S"]) -> Float[Array, "*S 3"]:
    """Saturated colours of a hue in [0, 1)."""
    offsets = jnp.array([0.0, 4.0, 2.0]).reshape(*[1] * hue.ndim, 3)
    ramp = jnp.abs(jnp.mod(6 * hue[..., None] + offsets, 6.0) - 3.0) - 1.0
    return 1.8 * jnp.clip(ramp, 0.0, 1.0) - 0.8


def _bounce(position: Array, low: Array, high: Array) -> Array:
    """The position of a point that is reflected at `low` and `high`."""
    width = high - low
    return low + width - jnp.abs(jnp.mod(position - low, 2 * width) - width)


def _distance(kind: Int[Array, "B"], offset: Float[Array, "B T H W 2"], radius: Float[Array, "B"]) -> Array:
    """Signed distance in pixels to the border of a shape, negative inside: f32[B, T, H, W]."""
    kind, radius = (value[:, None, None, None] for value in (kind, radius))
    y, x = offset[..., 0], offset[..., 1]
    disc = jnp.hypot(y, x) - radius
    square = jnp.maximum(jnp.abs(y), jnp.abs(x)) - 0.85 * radius
    triangle = jnp.maximum(y, math.sqrt(0.75) * jnp.abs(x) - 0.5 * y) - 0.6 * radius
    return jnp.where(kind == 0, disc, jnp.where(kind == 1, square, triangle))


class MovingField(NamedTuple):
    """A video of independent tokens, each a Gaussian mixture: x0 = modes[k] + std * n with k uniform.

    A token whose modes are equal is static: it keeps the value of the frame before, but for the noise.
    """

    modes: Float[Array, "B L K C"]
    std: Float[Array, ""]


def random_field(
    key: Array,
    batch: int = 12,
    frames: int = 4,
    tokens: int = 32,
    channels: int = 4,
    *,
    dynamic: float = 0.25,
    modes: int = 6,
    std: float = 0.05,
) -> MovingField:
    """A field of L = frames * tokens tokens, of which in every frame the same share `dynamic` moves.

    The modes of a moving token are drawn for every frame around the value that it had before.

    Raises:
      ValueError: an empty batch or field, or a share outside of [0, 1].
    """
    if min(batch, frames, tokens, channels, modes) < 1 or not 0 <= dynamic <= 1:
        sizes = dict(batch=batch, frames=frames, tokens=tokens, channels=channels, modes=modes, dynamic=dynamic)
        raise ValueError(f"a field needs positive sizes and a share of moving tokens within [0, 1], found {sizes}")
    before_key, mode_key, moving_key = jax.random.split(key, 3)
    before = jax.random.normal(before_key, (batch, 1, tokens, 1, channels))
    steps = jax.random.normal(mode_key, (batch, frames, tokens, modes, channels))
    order = jax.random.uniform(moving_key, (batch, tokens)).argsort(1).argsort(1)
    moves = (order < round(dynamic * tokens))[:, None, :, None, None]
    centres = before + jnp.where(moves, steps, 0.0)
    return MovingField(centres.reshape(batch, frames * tokens, modes, channels), jnp.float32(std))


def field_mean(field: MovingField, x: Float[Array, "B L C"], t: Float[Array, "B"]) -> Float[Array, "B L C"]:
    """E[x0 | x] exactly, for x = (1 - t) x0 + t n with standard normal n and t in (0, 1]."""
    t = t.astype(x.dtype)[:, None, None, None]
    variance = jnp.square(field.std).astype(x.dtype)
    total = jnp.square(1 - t) * variance + jnp.square(t)
    error = x[:, :, None] - (1 - t) * field.modes
    weight = jax.nn.softmax(-0.5 * jnp.sum(jnp.square(error), -1) / total[..., 0], axis=-1)
    return jnp.einsum("blk,blkc->blc", weight, field.modes + (1 - t) * variance / total * error)
