"""Bicubic resizing against loops over the definition, against the published low-resolution images, against MATLAB."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.bicubic import cubic, imresize, taps
from jaxcomp.data.images import read_rgb


def weight_matrix(size, scale):
    """M[out, in] by the definition, pixel positions counted from 1 as in MATLAB."""
    kernel_width, shrink = (4 / scale, scale) if scale < 1 else (4.0, 1.0)
    matrix = np.zeros((int(np.ceil(size * scale)), size))
    for j in range(1, len(matrix) + 1):
        u = j / scale + 0.5 * (1 - 1 / scale)
        left = int(np.floor(u - kernel_width / 2))
        for index in range(left, left + int(np.ceil(kernel_width)) + 2):
            t = abs((u - index) * shrink)
            if t <= 1:
                weight = 1.5 * t**3 - 2.5 * t**2 + 1
            else:
                weight = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0
            mirrored = index
            while not 1 <= mirrored <= size:
                mirrored = 1 - mirrored if mirrored < 1 else 2 * size + 1 - mirrored
            matrix[j - 1, mirrored - 1] += weight
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scale", [4, 3, 2, 1 / 2, 1 / 3, 1 / 4, 0.7, 1.3])
def test_equals_the_definition(scale):
    image = np.random.default_rng(0).uniform(0, 255, (31, 22, 3))
    expected = np.einsum("ih,hwc->iwc", weight_matrix(31, scale), image)
    expected = np.einsum("jw,iwc->ijc", weight_matrix(22, scale), expected)
    found = imresize(image.astype(np.float32), scale)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", ["baby", "bird", "butterfly", "head", "woman"])
def test_published_low_resolution_images_bit_for_bit(data_dir, name, scale):
    folder = data_dir / "sr" / "set5"
    expected = read_rgb(folder / f"LR_x{scale}" / f"{name}.png")
    found = imresize(read_rgb(folder / "HR" / f"{name}.png"), 1 / scale)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [1 / 4, 3])
def test_constant_images_stay_constant(scale):
    np.testing.assert_allclose(imresize(np.full((9, 7, 1), 77.0, np.float32), scale), 77, rtol=1e-6)
    assert np.all(imresize(np.full((9, 7, 3), 77, np.uint8), scale) == 77)


def test_ramp_is_kept_inside():
    ramp = np.repeat(np.arange(40, dtype=np.float32)[:, None, None], 5, axis=1)
    found = np.asarray(imresize(ramp, 2))[8:-8, 0, 0]
    np.testing.assert_allclose(found, (np.arange(80)[8:-8] + 0.5) / 2 - 0.5, atol=1e-4)


def test_weights_sum_to_one_and_a_quarter_needs_at_most_18_taps():
    index, weight = taps(33, 1 / 4)
    assert weight.shape[1] <= 18 and index.min() >= 0 and index.max() < 33
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    np.testing.assert_array_equal(cubic(np.array([0, 1, 2, 2.5])), [1, 0, 0, 0])


def test_one_pixel_image():
    np.testing.assert_allclose(imresize(np.full((1, 1, 3), 5.0, np.float32), 4), np.full((4, 4, 3), 5.0), rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="positive scale"):
        imresize(np.zeros((4, 4, 3), np.float32), 0)
    with pytest.raises(ValueError, match=r"uint8 or float, found int32 \(4, 4, 3\)"):
        imresize(np.zeros((4, 4, 3), np.int32), 2)
