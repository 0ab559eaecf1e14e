"""Windows cover the image; joints are exact where the receptive field allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.tiling import spans, tiled
from jaxcomp.evaluate.restoration import restorer
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.models.ditn import DITN
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rlfn import RLFN


def random_params(model, spread=0.2):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, spread, leaf.shape), leaf.dtype), param_shapes(model))


def image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "size, tile, overlap", [(100, 16, 4), (97, 16, 4), (24, 16, 4), (25, 16, 4), (1, 16, 4), (64, 8, 0)]
)
def test_kept_parts_tile_the_axis_away_from_every_cut(size, tile, overlap):
    window, found = spans(size, tile, overlap)
    assert [index for span in found for index in range(span.first, span.last)] == list(range(size))
    for span in found:
        assert 0 <= span.start and span.start + window <= size
        assert span.start == 0 or span.first - span.start >= overlap
        assert span.start + window == size or span.start + window - span.last >= overlap


def test_only_one_shape_is_seen_and_memory_is_bounded_by_the_window():
    seen = []

    def double(x):
        seen.append(x.shape)
        return x.repeat(2, axis=1).repeat(2, axis=2)

    x = image(61, 45)
    found = tiled(double, x, scale=2, tile=16, overlap=3)
    np.testing.assert_array_equal(found, x.repeat(2, axis=0).repeat(2, axis=1))
    assert set(seen) == {(1, 22, 22, 3)} and len(seen) == 4 * 3


def test_local_network_is_exact_at_its_receptive_radius_and_wrong_below():
    model = IMDN(channels=8, num_blocks=1, scale=2)
    params, x = random_params(model, 0.4), image(53, 40)
    apply = jax.jit(lambda x: model.apply({"params": params}, x.astype(jnp.float32) / 255))
    whole = np.asarray(apply(x[None]))[0]
    error = lambda overlap: np.abs(tiled(apply, x, scale=2, tile=10, overlap=overlap) - whole).max() / np.ptp(whole)
    assert error(model.receptive_radius) < 1e-5
    assert error(model.receptive_radius - 3) > 1e-4


def test_patches_stay_aligned():
    model = DITN(8, inner_layers=1, spatial_layers=1, scale=2)
    params, x = random_params(model), image(93, 81)
    apply = jax.jit(lambda x: model.apply({"params": params}, x.astype(jnp.float32) / 255))
    whole = np.asarray(apply(x[None]))[0]
    found = tiled(apply, x, scale=2, tile=16, overlap=24, multiple=8)
    assert model.receptive_radius <= 24 and found.shape == (186, 162, 3)
    np.testing.assert_allclose(found, whole, atol=1e-5 * np.ptp(whole))


def test_global_attention_is_only_approximated(data_dir):
    from jaxcomp.data.images import read_rgb
    from jaxcomp.evaluate.restoration import psnr
    from jaxcomp.io.super_resolution import load_super_resolver

    model, params = load_super_resolver("rlfn_ntire_x4", data_dir / "sr" / "weights" / "rlfn_ntire_x4.safetensors")
    x = read_rgb(data_dir / "sr" / "div2k_test_LR_x4" / "0901.png")[100:196, 200:296]
    assert model.receptive_radius is None
    whole = restorer(model, params)(x)
    quality = [psnr(restorer(model, params, tile=32, overlap=o)(x), whole, border=0, channel="rgb") for o in (0, 16)]
    assert quality[0] + 2 < quality[1] and 40 < quality[1] < 80


@pytest.mark.parametrize("options", [dict(tile=12, overlap=8), dict(tile=16, overlap=4), dict(tile=0, overlap=8)])
def test_bad_tiles_are_refused(options):
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled(lambda x: x, image(40, 40), scale=1, multiple=8, **options)


def test_images_below_the_smallest_size_are_filled():
    model = RLFN(8, 8, 1, 4)
    params = random_params(model)
    one = restorer(model, params, tile=32)(image(1, 1))
    filled = restorer(model, params)(np.broadcast_to(image(1, 1), (15, 15, 3)))
    assert one.shape == (4, 4, 3)
    np.testing.assert_array_equal(one, filled[:4, :4])


def test_16_bits_are_used():
    model = IMDN(channels=8, num_blocks=1, scale=2)
    params = random_params(model)
    fine = restorer(model, params)(image(20, 20).astype(np.uint16) * 257)
    coarse = restorer(model, params)(image(20, 20))
    assert fine.dtype == np.uint16
    np.testing.assert_allclose(fine / 257, coarse, atol=0.51)
    assert np.any(fine % 257)
