"""PSNR and SSIM against scikit-image; the published table on Set5 with the published weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.bicubic import imresize
from jaxcomp.data.images import read_rgb
from jaxcomp.evaluate.restoration import Restoration, luma, mod_crop, psnr, restoration, restorer, ssim, to_uint8
from jaxcomp.io.super_resolution import load_super_resolver, param_shapes
from jaxcomp.models.rlfn import RLFN

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def images(seed=0, shape=(40, 37, 3)):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape)
    return a.astype(np.uint8), np.clip(a + rng.integers(-40, 41, shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_psnr_and_ssim_equal_scikit_image(border, seed):
    metrics, color = pytest.importorskip("skimage.metrics"), pytest.importorskip("skimage.color")
    a, b = images(seed)
    shave = lambda x: x[border : x.shape[0] - border, border : x.shape[1] - border]
    gaussian = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    y = [shave(color.rgb2ycbcr(x)[..., 0]) for x in (a, b)]
    rgb = [shave(x).astype(np.float64) for x in (a, b)]
    for channel, pair, axis in (("y", y, None), ("rgb", rgb, -1)):
        options = dict(border=border, channel=channel)
        assert psnr(a, b, **options) == pytest.approx(metrics.peak_signal_noise_ratio(*pair, data_range=255), abs=1e-6)
        expected = metrics.structural_similarity(*pair, channel_axis=axis, **gaussian)
        assert ssim(a, b, **options) == pytest.approx(expected, abs=1e-6)


def test_luma_of_black_and_white():
    np.testing.assert_allclose(luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)), [[16, 235]])


def test_equal_images():
    a, _ = images()
    assert psnr(a, a, border=2, channel="y") == float("inf") and ssim(a, a, border=2, channel="rgb") == 1


@pytest.mark.parametrize("border", [0, 3])
def test_one_level_everywhere_is_48_dB(border):
    a = images()[0] // 2
    assert psnr(a, a + np.uint8(1), border=border, channel="rgb") == pytest.approx(48.1308, abs=1e-4)


def test_border_is_not_scored():
    a, _ = images()
    b = a.copy()
    b[:4], b[-4:], b[:, :4], b[:, -4:] = 0, 0, 0, 0
    assert psnr(a, b, border=4, channel="rgb") == float("inf") and psnr(a, b, border=3, channel="rgb") < 30


def test_rounding_is_that_of_the_challenge():
    found = to_uint8(np.array([-1.0, 0.5, 1.5, 2.5, 254.5, 300.0]), 255.0)
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 254, 255])
    np.testing.assert_array_equal(to_uint8(jnp.array([0.0, 0.5, 1.0, 2.0]), 1.0), [0, 128, 255, 255])


def test_mod_crop():
    assert mod_crop(np.zeros((37, 41, 3)), 4).shape == (36, 40, 3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refusals(metric):
    a, b = images()
    with pytest.raises(ValueError, match="two uint8 images"):
        metric(a, b[1:], border=0, channel="y")
    with pytest.raises(ValueError, match="two uint8 images"):
        metric(a.astype(np.float32), b, border=0, channel="y")
    with pytest.raises(ValueError, match="leaves nothing of 40 x 37"):
        metric(a, b, border=19, channel="y")
    with pytest.raises(ValueError, match="'cb' is unknown"):
        metric(a, b, border=0, channel="cb")
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a, b, border=14, channel="y")


def test_means_are_over_images():
    scores = Restoration("y", 4, {"a": 30.0, "b": 20.0}, {"a": 0.9, "b": 0.5})
    assert scores.psnr == 25 and scores.ssim == pytest.approx(0.7)
    assert scores.convention == "Y of BT.601 studio range, uint8, border 4 px shaved, mean over 2 images"
    assert "RGB" in dataclasses.replace(scores, channel="rgb").convention


@pytest.mark.parametrize(
    "name, y, structure, rgb", [("astronaut", 26.84, 0.8429, 25.34), ("chelsea", 31.48, 0.8064, 30.05)]
)
def test_bicubic_of_bundled_images(name, y, structure, rgb):
    data = pytest.importorskip("skimage.data")
    high = mod_crop(getattr(data, name)(), 4)
    low = to_uint8(imresize(high.astype(np.float32), 1 / 4), 255)
    found = to_uint8(imresize(low.astype(np.float32), 4), 255)
    assert psnr(found, high, border=4, channel="y") == pytest.approx(y, abs=0.01)
    assert ssim(found, high, border=4, channel="y") == pytest.approx(structure, abs=2e-4)
    assert psnr(found, high, border=4, channel="rgb") == pytest.approx(rgb, abs=0.01)


def test_quantized_leaves_run_and_8_bits_cost_little():
    from jaxcomp.quantize import rtn

    model = RLFN(8, 8, 1, 4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), param_shapes(model))
    transform = rtn(bits=8)
    small, _ = transform.update(params, transform.init(params), None)
    low = images()[0]
    dense, quantized = restorer(model, params)(low), restorer(model, small)(low)
    assert 30 < psnr(dense, quantized, border=0, channel="rgb") < float("inf")


def set5(data_dir):
    read = lambda kind, name: read_rgb(data_dir / "sr" / "set5" / kind / f"{name}.png")
    return [(name, read("LR_x4", name), read("HR", name)) for name in SET5]


def test_published_rlfn_reaches_its_table_on_set5(data_dir):
    pairs = set5(data_dir)
    model, params = load_super_resolver("rlfn_x4", data_dir / "sr" / "weights" / "rlfn_x4.safetensors")
    ours = restoration(restorer(model, params), pairs, border=4, channel="y")
    bicubic = restoration(lambda low: np.asarray(imresize(low, 4)), pairs, border=4, channel="y")
    print(f"RLFN {ours.psnr:.4f} / {ours.ssim:.5f}, bicubic {bicubic.psnr:.4f} / {bicubic.ssim:.5f}; {ours.convention}")
    assert ours.psnr == pytest.approx(32.24, abs=0.01) and ours.ssim == pytest.approx(0.8952, abs=2e-4)
    assert ours.psnr > bicubic.psnr + 3.5
