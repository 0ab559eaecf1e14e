"""RLFN against a PyTorch module written from the paper, its parameter counts, its attention block by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.images import read_rgb
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.safetensors import save_safetensors
from jaxcomp.io.super_resolution import load_super_resolver, param_shapes
from jaxcomp.models.rlfn import RLFB, RLFN, rlfn_ntire, rlfn_s
from jaxcomp.models.sr_blocks import ESA, pixel_shuffle


def torch_rlfn(channels, mid, blocks, scale):
    """The network in PyTorch, tensors named as its authors publish them; weights of seed 0."""
    torch = pytest.importorskip("torch")
    from experiments import torch_sr

    torch.manual_seed(0)
    return torch_sr.RLFN(channels, mid, blocks, scale).eval()


def parity(name, network, path, image):
    """Largest difference of our network and the PyTorch one with the weights of `path`."""
    import safetensors.torch
    import torch

    network.load_state_dict(safetensors.torch.load_file(path))
    model, params = load_super_resolver(name, path)
    with torch.no_grad():
        expected = network(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = np.asarray(jax.jit(model.apply)({"params": params}, image))
    assert found.shape == expected.shape and np.ptp(expected) > 1
    return np.abs(found - expected).max()


def image(height=23, width=18, batch=2):
    return np.random.default_rng(0).uniform(0, 255, (batch, height, width, 3)).astype(np.float32)


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))


@pytest.mark.parametrize(
    "model, expected",
    [
        (RLFN(), 543_740),
        (RLFN(scale=2), 526_856),
        (rlfn_s(), 470_208),
        (rlfn_s(2), 454_620),
        (rlfn_ntire(), 317_218),
        (RLFN(48, 48, 4), 327_776),
    ],
)
def test_parameters(model, expected):
    assert count(model) == expected


@pytest.mark.parametrize("name, sizes", [("rlfn_ntire_x4", (46, 48, 4, 4)), ("rlfn_s_x2", (48, 48, 6, 2))])
def test_equals_pytorch(name, sizes, tmp_path):
    network = torch_rlfn(*sizes)
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", weights)
    assert parity(name, network, tmp_path / "w.safetensors", image()) < 1e-3


@pytest.mark.parametrize("name, sizes", [("rlfn_x4", (52, 52, 6, 4)), ("rlfn_ntire_x4", (46, 48, 4, 4))])
def test_published_weights_equal_pytorch(name, sizes, data_dir):
    photo = read_rgb(data_dir / "sr" / "set5" / "LR_x4" / "woman.png")[None, 20:60, 8:43].astype(np.float32)
    path = data_dir / "sr" / "weights" / f"{name}.safetensors"
    assert parity(name, torch_rlfn(*sizes), path, photo) < 1e-3


def test_both_repositories_publish_the_same_winner(data_dir):
    folder = data_dir / "sr" / "weights"
    _, ours = load_super_resolver("rlfn_ntire_x4", folder / "rlfn_ntire_x4.safetensors")
    _, theirs = load_super_resolver("rlfn_ntire_x4", folder / "ntire2022_team04_rlfn.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown; expected one of rlfn_x4"):
        load_super_resolver("rlfn", tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="reading a pickle runs code"):
        load_super_resolver("rlfn_x4", tmp_path / "w.pth")
    save_safetensors(tmp_path / "w.safetensors", {"conv_1.weight": np.zeros((46, 3, 3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"conv_1|block_1"):
        load_super_resolver("rlfn_x4", tmp_path / "w.safetensors")


def test_superfluous_tensor_is_refused(tmp_path):
    weights = {key: value.numpy() for key, value in torch_rlfn(46, 48, 4, 4).state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", weights | {"esa.conv9.bias": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="1 more"):
        load_super_resolver("rlfn_ntire_x4", tmp_path / "w.safetensors")


def random_params(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


def test_attention_of_zero_weights_halves():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 15, 17, 8)), jnp.float32)
    module = ESA(4, depth=1)
    params = random_params(module, x)
    params["expand"] = jax.tree.map(jnp.zeros_like, params["expand"])
    np.testing.assert_array_equal(module.apply({"params": params}, x), 0.5 * x)


def test_block_of_zero_third_convolution_is_attention_of_the_fused_input():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 16, 15, 8)), jnp.float32)
    module = RLFB(8, 8, 4)
    params = random_params(module, x)
    params["conv_2"] = jax.tree.map(jnp.zeros_like, params["conv_2"])
    fused = x @ params["fuse"]["kernel"][0, 0] + params["fuse"]["bias"][None, None, None]
    expected = ESA(4, depth=1).apply({"params": params["esa"]}, fused)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_smallest_input():
    model = rlfn_ntire()
    shape = lambda size: jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, *size, 3)))[0].shape
    assert shape((15, 15)) == (1, 60, 60, 3)
    with pytest.raises(ValueError, match=r"at least 15 x 15 pixels, found 14 x 20; pad"):
        shape((14, 20))


def test_pixel_shuffle_order():
    x = np.arange(2 * 3 * 12, dtype=np.float32).reshape(1, 2, 3, 12)
    y = np.asarray(pixel_shuffle(jnp.asarray(x), 2))
    for c, i, j in np.ndindex(3, 2, 2):
        np.testing.assert_array_equal(y[:, i::2, j::2, c], x[..., c * 4 + i * 2 + j])
