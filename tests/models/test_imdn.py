"""The simplified IMDN of NTIRE 2022 against a PyTorch module written from its description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.images import read_rgb
from jaxcomp.io.safetensors import save_safetensors
from jaxcomp.io.super_resolution import load_super_resolver, param_shapes
from jaxcomp.models.imdn import IMDN


def torch_imdn():
    """The network in PyTorch, tensors named as the challenge publishes them; weights of seed 0."""
    torch = pytest.importorskip("torch")
    from experiments import torch_sr

    torch.manual_seed(0)
    return torch_sr.IMDN().eval()


def compare(network, path, image):
    """Largest difference on the scale of [0, 255]."""
    import safetensors.torch
    import torch

    network.load_state_dict(safetensors.torch.load_file(path))
    model, params = load_super_resolver("imdn_ntire_x4", path)
    with torch.no_grad():
        expected = network(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = np.asarray(jax.jit(model.apply)({"params": params}, image))
    assert found.shape == expected.shape and np.ptp(expected) > 0.1
    return 255 * np.abs(found - expected).max()


def test_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(IMDN()))) == 893_936


def test_equals_pytorch(tmp_path):
    network = torch_imdn()
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", weights)
    image = np.random.default_rng(0).uniform(0, 1, (1, 19, 14, 3)).astype(np.float32)
    assert compare(network, tmp_path / "w.safetensors", image) < 1e-3


def test_published_weights_equal_pytorch(data_dir):
    photo = read_rgb(data_dir / "sr" / "set5" / "LR_x4" / "woman.png")[None, 20:60, 8:43].astype(np.float32) / 255
    assert compare(torch_imdn(), data_dir / "sr" / "weights" / "ntire2022_imdn_baseline.safetensors", photo) < 1e-3


def test_receptive_radius_is_reached_and_not_exceeded():
    model = IMDN(channels=8, num_blocks=1, scale=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 31, 31, 3)), jnp.float32)
    shapes = param_shapes(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)
    apply = lambda x: model.apply({"params": params}, x)
    moved = np.argwhere(np.any(apply(x) != apply(x.at[0, 15, 15].add(1.0)), axis=(0, 3)))
    assert np.abs(moved - 15).max() == model.receptive_radius == 7
