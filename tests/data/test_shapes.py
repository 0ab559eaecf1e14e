"""Moving shapes are what their scene says; the field's denoiser is the exact posterior mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.shapes import KINDS, MovingField, field_mean, random_field, random_scene, render

SIZE = 32
render = jax.jit(render, static_argnums=(1, 2))


def scene(batch=4, **options):
    return random_scene(jax.random.key(0), batch, SIZE, **options)


def test_a_still_camera_leaves_the_background_alone():
    video = render(scene(moving_camera=0.0)._replace(radius=jnp.zeros((4, 2))), 5, SIZE)
    np.testing.assert_array_equal(video, jnp.broadcast_to(video[:, :1], video.shape))


def test_a_camera_shifts_the_background_by_whole_pixels():
    moved = scene()._replace(radius=jnp.zeros((4, 2)), camera=jnp.tile(jnp.array([[1.0, 2.0]]), (4, 1)))
    video = render(moved, 2, SIZE)
    np.testing.assert_allclose(video[:, 1, :-1, :-2], video[:, 0, 1:, 2:], atol=1e-5)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_shape_has_its_colour_and_moves_at_its_speed(kind):
    centre = jnp.full((1, 2, 2), 12.0)
    velocity = jnp.array([[[2.0, 1.0], [0.0, 0.0]]])
    one = scene(1, moving_camera=0.0)._replace(
        kind=jnp.array([kind]), centre=centre, velocity=velocity, radius=jnp.array([[5.0, 0.0]])
    )
    video = render(one, 4, SIZE)
    for t in range(4):
        np.testing.assert_allclose(video[0, t, 12 + 2 * t, 12 + t], one.colour[0, 0], atol=1e-6)


def test_shapes_stay_in_the_frame():
    fast = scene(moving_camera=0.0)
    fast = fast._replace(
        velocity=fast.velocity * 20,
        ground=jnp.full_like(fast.ground, -1.0),
        swing=jnp.zeros_like(fast.swing),
        colour=jnp.ones_like(fast.colour),
    )
    lit = np.asarray((render(fast, 8, SIZE).max(-1) > -0.99).sum((2, 3)))
    single = np.asarray(fast.radius[:, 1] == 0)
    assert single.any() and (lit > 0).all()
    assert (np.ptp(lit[single], axis=1) < 0.4 * lit[single].max(1)).all()


def test_values_and_seeds():
    video = render(scene(), 3, SIZE)
    assert video.shape == (4, 3, SIZE, SIZE, 3) and bool((jnp.abs(video) <= 1).all())
    other = random_scene(jax.random.key(1), 4, SIZE)
    assert not jnp.array_equal(video, render(other, 3, SIZE))


@pytest.mark.parametrize("batch, size", [(0, 32), (2, 4)])
def test_bad_scenes_say_what_is_wrong(batch, size):
    with pytest.raises(ValueError, match=f"found {batch} and {size}"):
        random_scene(jax.random.key(0), batch, size)


def test_still_tokens_keep_one_mode_and_the_others_move():
    field = random_field(jax.random.key(0), 3, frames=4, tokens=16, dynamic=0.25)
    spread = jnp.ptp(field.modes, axis=2).max(-1).reshape(3, 4, 16)
    moving = spread > 0
    np.testing.assert_array_equal(moving.sum(-1), 4)
    np.testing.assert_array_equal(moving, np.broadcast_to(moving[:, :1], moving.shape))


@pytest.mark.parametrize("t", [0.2, 0.9])
def test_the_field_mean_is_the_posterior_mean(t):
    """Against a weighted mean over many draws of x0."""
    field = random_field(jax.random.key(1), 1, frames=1, tokens=1, channels=1, dynamic=1.0, modes=3, std=0.2)
    draws = 200_000
    rng = np.random.default_rng(0)
    x0 = np.asarray(field.modes)[0, 0, rng.integers(3, size=draws), 0] + 0.2 * rng.normal(size=draws)
    for x in (-1.0, 0.3, 1.5):
        weight = np.exp(-0.5 * ((x - (1 - t) * x0) / t) ** 2)
        expected = (weight * x0).sum() / weight.sum()
        found = jax.jit(field_mean)(field, jnp.full((1, 1, 1), x), jnp.array([t]))
        np.testing.assert_allclose(found[0, 0, 0], expected, atol=0.02)


def test_a_still_token_has_constant_velocity_without_spread():
    field = random_field(jax.random.key(2), 1, frames=1, tokens=2, dynamic=0.0)
    field = MovingField(field.modes, jnp.float32(0.0))
    noise = jax.random.normal(jax.random.key(3), (1, 2, 4))
    velocity = [
        (x - field_mean(field, x, jnp.array([t]))) / t
        for t in (0.9, 0.3)
        for x in [(1 - t) * field.modes[:, :, 0] + t * noise]
    ]
    np.testing.assert_allclose(velocity[0], velocity[1], atol=1e-4)


@pytest.mark.parametrize("options", [dict(batch=0), dict(dynamic=1.5), dict(tokens=0)])
def test_bad_fields_say_what_is_wrong(options):
    with pytest.raises(ValueError, match="positive sizes"):
        random_field(jax.random.key(0), **options)
