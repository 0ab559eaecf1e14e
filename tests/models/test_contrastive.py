"""The contrastive loss against its definition in numpy, and where its gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.contrastive import contrastive_loss, shallow_features

RNG = np.random.default_rng(0)
SR, HR, BICUBIC = (jnp.asarray(RNG.uniform(0, 1, (2, 9, 8, 3)), jnp.float32) for _ in range(3))
EXTRACT = shallow_features(jax.random.key(0), 8)


@pytest.mark.parametrize("form", ["ratio", "difference"])
def test_equals_its_definition(form):
    distance = lambda a, b: np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    expected = 0
    for sr, hr, low in zip(EXTRACT(SR), EXTRACT(HR), EXTRACT(BICUBIC), strict=True):
        near, far = distance(sr, hr), distance(sr, low)
        expected += near / far if form == "ratio" else near - far
    np.testing.assert_allclose(contrastive_loss(EXTRACT, SR, HR, BICUBIC, form), expected, rtol=1e-4, atol=1e-6)


def test_layers_are_a_bounded_one_and_a_linear_one_without_padding():
    first, second = EXTRACT(SR)
    assert first.shape == (2, 7, 6, 8) and second.shape == (2, 5, 4, 8)
    assert np.abs(first).max() < 1 < np.abs(EXTRACT(50 * SR)[1]).max()


def test_zero_at_the_truth_and_bounded_at_the_negative():
    assert contrastive_loss(EXTRACT, HR, HR, BICUBIC) == 0
    assert contrastive_loss(EXTRACT, BICUBIC, HR, BICUBIC) == 20  # two layers, each at its bound


def test_gradients_reach_the_anchor_only():
    grads = jax.grad(lambda *images: contrastive_loss(EXTRACT, *images), argnums=(0, 1, 2))(SR, HR, BICUBIC)
    assert [bool(np.any(grad)) for grad in grads] == [True, False, False]


def test_a_step_along_the_gradient_approaches_the_truth():
    blurred = 0.5 * (HR + BICUBIC)
    loss = lambda sr: contrastive_loss(EXTRACT, sr, HR, BICUBIC)
    stepped = blurred - 0.1 * jax.grad(loss)(blurred)
    assert loss(stepped) < loss(blurred)


def test_bfloat16_images_give_a_float32_loss():
    assert contrastive_loss(EXTRACT, SR.astype(jnp.bfloat16), HR, BICUBIC).dtype == jnp.float32
