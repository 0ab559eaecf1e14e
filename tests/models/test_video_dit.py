"""The video DiT is block-causal, its chunks and tokens can be run one by one, and its velocity is that of its x0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.video_dit import ChunkKV, VideoDiT, VideoDiTConfig, patchify, unpatchify
from jaxcomp.sampling.autoregressive import sequence_velocity, video_denoiser

CONFIG = VideoDiTConfig(frames=2, size=8, patch=4, channels=2, width=16, depth=2, heads=2, classes=3)
MODEL = VideoDiT(CONFIG)
CHUNKS, BATCH = 3, 2


def random_params():
    """Far from the initial values, which close every gate."""
    x = jnp.zeros((1, 1, CONFIG.chunk_tokens, CONFIG.token_channels))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x, jnp.ones((1, 1)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


PARAMS = random_params()
X = jax.random.normal(jax.random.key(1), (BATCH, CHUNKS, CONFIG.chunk_tokens, CONFIG.token_channels))
T, LABEL = jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 2])


@jax.jit
def run(x, t, label):
    return MODEL.apply({"params": PARAMS}, x, jnp.broadcast_to(t, x.shape[:2]), label)


def test_patches_come_back():
    video = jax.random.normal(jax.random.key(0), (2, 6, 8, 8, 2))
    tokens = patchify(video, CONFIG)
    assert tokens.shape == (2, 3, CONFIG.chunk_tokens, CONFIG.token_channels)
    np.testing.assert_array_equal(unpatchify(tokens, CONFIG), video)
    np.testing.assert_array_equal(tokens[1, 2, 4 + 1].reshape(4, 4, 2), video[1, 5, :4, 4:])


@pytest.mark.parametrize("shape, found", [((1, 5, 8, 8, 2), "found 5 frames"), ((1, 4, 8, 6, 2), r"\(8, 6, 2\)")])
def test_wrong_videos_say_what_is_wrong(shape, found):
    with pytest.raises(ValueError, match=found):
        patchify(jnp.zeros(shape), CONFIG)


@pytest.mark.parametrize("options", [dict(patch=3), dict(heads=3), dict(width=8, heads=2)])
def test_wrong_sizes_say_what_is_wrong(options):
    with pytest.raises(ValueError, match=r"use a divisor|a head needs"):
        VideoDiTConfig(**dict(size=8, width=16, heads=2) | options)


def test_later_chunks_are_not_seen():
    x, t, label = X, T, LABEL
    changed = run(x.at[:, 2].add(1.0), t.at[2].set(0.3), label)
    np.testing.assert_array_equal(changed[:, :2], run(x, t, label)[:, :2])
    assert float(jnp.abs(changed[:, 2] - run(x, t, label)[:, 2]).max()) > 0.01


@pytest.mark.parametrize("what", ["x", "t"])
def test_earlier_chunks_are_seen(what):
    x, t, label = X, T, LABEL
    other = (x.at[:, 0].add(1.0), t) if what == "x" else (x, t.at[0].set(0.7))
    assert float(jnp.abs(run(*other, label)[:, 2] - run(x, t, label)[:, 2]).max()) > 1e-3


def test_one_chunk_after_the_other_is_the_whole():
    x, t, label = X, T, LABEL
    one_by_one = jax.jit(lambda x, t, y: sequence_velocity(video_denoiser(MODEL), PARAMS, x, t, y))
    np.testing.assert_allclose(one_by_one(x, t, label), run(x, t, label), atol=2e-5)


@pytest.mark.parametrize("share", ["some", "all"])
def test_tokens_with_fresh_keys_are_rows_of_the_full_forward(share):
    x, label, denoiser = X, LABEL, video_denoiser(MODEL)
    index = jnp.array([[0, 3, 6], [1, 2, 7]]) if share == "some" else jnp.tile(jnp.arange(8), (2, 1))

    @jax.jit
    def both(x):
        h, c = denoiser.embed(PARAMS, x, jnp.full((BATCH,), 0.4), label)
        whole, cache = denoiser.trunk(PARAMS, h, c, (denoiser.cache(BATCH),), None)
        chosen = jnp.take_along_axis(h, index[..., None], 1)
        part, again = denoiser.trunk(PARAMS, chosen, c, (cache,), index)
        return jnp.take_along_axis(whole, index[..., None], 1), part, cache, again

    whole, part, cache, again = both(x[:, 0])
    np.testing.assert_allclose(part, whole, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache, again)


def test_tokens_that_are_left_out_keep_their_keys():
    denoiser, index = video_denoiser(MODEL), jnp.array([[5], [0]])
    cache = ChunkKV(*(jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(denoiser.cache(BATCH))))

    @jax.jit
    def update(x):
        h, c = denoiser.embed(PARAMS, x, jnp.full((BATCH,), 0.4), None)
        return denoiser.trunk(PARAMS, jnp.take_along_axis(h, index[..., None], 1), c, (cache,), index)[1]

    changed = jnp.abs(update(X[:, 0]).key - cache.key).max((0, 3, 4)) > 0
    expected = np.zeros((BATCH, CONFIG.chunk_tokens), bool)
    expected[[0, 1], [5, 0]] = True
    np.testing.assert_array_equal(changed, expected)


def test_labels_matter_and_none_is_a_label():
    x, t, label = X, T, LABEL
    assert float(jnp.abs(run(x, t, label) - run(x, t, label[::-1])).max()) > 1e-3
    np.testing.assert_array_equal(run(x, t, None), run(x, t, jnp.array([3, 3])))


def test_the_velocity_is_that_of_a_clean_estimate():
    """x - t v does not depend on t but through the network; at t below min_time it is scaled as at min_time."""
    fresh = MODEL.init(jax.random.key(0), X, jnp.ones((BATCH, CHUNKS)))["params"]  # its head is zero: x0 = 0
    x, t = X, T
    velocity = MODEL.apply({"params": fresh}, x, jnp.broadcast_to(t.at[0].set(0.01), x.shape[:2]))
    expected = x / jnp.maximum(t.at[0].set(0.01), CONFIG.min_time)[None, :, None, None]
    np.testing.assert_allclose(velocity, expected, rtol=1e-5)
