"""Quantizers on a convolutional network with its published weights: the winner of NTIRE 2022 on a crop of Set5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.data.bicubic import imresize
from jaxcomp.data.images import read_rgb
from jaxcomp.evaluate.restoration import psnr, to_uint8
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.quantize import gptq, rtn

TOP, LEFT, SIZE = 8, 12, 32


class Crop:
    """The network, its params, and a crop of a photograph with its truth."""

    def __init__(self, data_dir):
        folder = data_dir / "sr"
        self.model, self.params = load_super_resolver("rlfn_ntire_x4", folder / "weights" / "rlfn_ntire_x4.safetensors")
        low, high = (read_rgb(folder / "set5" / kind / "butterfly.png") for kind in ("LR_x4", "HR"))
        cut = lambda image, scale: image[scale * TOP : scale * (TOP + SIZE), scale * LEFT : scale * (LEFT + SIZE)]
        self.image, self.low, self.high = low, cut(low, 1), cut(high, 4)
        self.x = jnp.asarray(self.low[None], jnp.float32)
        self.run = jax.jit(compressed(self.apply))

    def apply(self, params, x):
        return self.model.apply({"params": params}, x)

    def psnr(self, params):
        return psnr(to_uint8(self.run(params, self.x)[0], 255.0), self.high, border=4, channel="y")


@pytest.fixture(scope="module")
def crop(data_dir):
    return Crop(data_dir)


def test_eight_bits_cost_little_and_no_leaf_is_materialised(crop):
    small, _, _ = compress(rtn(8, act_bits=8), crop.params)
    found = explain(crop.apply, small, crop.x)
    assert not found.materialised and not found.unused
    assert {e.kernel for e in found.events} == {"decode_conv[int8_matmul[w8a8]]"}
    assert nbytes(small) < 0.29 * nbytes(crop.params)
    bicubic = psnr(np.asarray(imresize(crop.low, 4)), crop.high, border=4, channel="y")
    dense = crop.psnr(crop.params)
    assert dense > bicubic + 2 and dense - 1 < crop.psnr(small) <= dense + 0.1


def test_activations_are_quantized_per_sample(crop):
    small, _, _ = compress(rtn(8, act_bits=8), crop.params)
    pair = jnp.concatenate([crop.x, crop.x / 8])
    alone = crop.run(small, crop.x)
    np.testing.assert_allclose(crop.run(small, pair)[:1], alone, atol=1e-2)


def test_second_order_rounding_beats_rounding_at_four_bits(crop):
    rules = [Rule("blocks_0/conv_*/kernel")]
    seen = jnp.asarray(crop.image[None, -SIZE:, -SIZE:], jnp.float32)  # another part of the photograph
    calibration = Calibration(crop.apply, [seen])
    rounded, _, _ = compress(rtn(4, rules=rules), crop.params)
    corrected, _, _ = compress(gptq(4, rules=rules), crop.params, calibration)
    error = lambda params: float(jnp.mean(jnp.square(crop.run(params, crop.x) - crop.run(crop.params, crop.x))))
    assert error(corrected) < 0.7 * error(rounded)
    assert crop.psnr(corrected) > crop.psnr(rounded)
