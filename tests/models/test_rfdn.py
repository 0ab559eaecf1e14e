"""RFDN against a PyTorch module written from its description."""

import jax
import numpy as np
import pytest

from jaxcomp.data.images import read_rgb
from jaxcomp.io.safetensors import save_safetensors
from jaxcomp.io.super_resolution import load_super_resolver, param_shapes
from jaxcomp.models.rfdn import RFDN


def torch_rfdn():
    """The network in PyTorch, tensors named as the challenge publishes them."""
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional
    act = lambda x: F.leaky_relu(x, 0.05)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv_f, self.conv4 = nn.Conv2d(50, 12, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 50, 1)
            self.conv2 = nn.Conv2d(12, 12, 3, stride=2)
            self.conv_max, self.conv3, self.conv3_ = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))

        def forward(self, x):
            full = self.conv1(x)
            low = F.max_pool2d(self.conv2(full), kernel_size=7, stride=3)
            low = self.conv3_(F.relu(self.conv3(F.relu(self.conv_max(low)))))
            low = F.interpolate(low, size=x.shape[2:], mode="bilinear", align_corners=False)
            return x * torch.sigmoid(self.conv4(low + self.conv_f(full)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for k in (1, 2, 3):
                setattr(self, f"c{k}_d", nn.Conv2d(50, 25, 1))
                setattr(self, f"c{k}_r", nn.Conv2d(50, 50, 3, padding=1))
            self.c4, self.c5, self.esa = nn.Conv2d(50, 25, 3, padding=1), nn.Conv2d(100, 50, 1), Attention()

        def forward(self, x):
            d1, x = act(self.c1_d(x)), act(self.c1_r(x) + x)
            d2, x = act(self.c2_d(x)), act(self.c2_r(x) + x)
            d3, x = act(self.c3_d(x)), act(self.c3_r(x) + x)
            return self.esa(self.c5(torch.cat([d1, d2, d3, act(self.c4(x))], dim=1)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fea_conv, self.LR_conv = nn.Conv2d(3, 50, 3, padding=1), nn.Conv2d(50, 50, 3, padding=1)
            self.B1, self.B2, self.B3, self.B4 = (Block() for _ in range(4))
            self.c = nn.Sequential(nn.Conv2d(200, 50, 1), nn.LeakyReLU(0.05))
            self.upsampler = nn.Sequential(nn.Conv2d(50, 48, 3, padding=1), nn.PixelShuffle(4))

        def forward(self, x):
            head = self.fea_conv(x)
            b1 = self.B1(head)
            b2 = self.B2(b1)
            b3 = self.B3(b2)
            merged = self.c(torch.cat([b1, b2, b3, self.B4(b3)], dim=1))
            return self.upsampler(self.LR_conv(merged) + head)

    torch.manual_seed(0)
    return Network().eval()


def compare(network, path, image):
    """Largest difference; the network works in [0, 255]."""
    import safetensors.torch
    import torch

    network.load_state_dict(safetensors.torch.load_file(path))
    model, params = load_super_resolver("rfdn_ntire_x4", path)
    with torch.no_grad():
        expected = network(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = np.asarray(jax.jit(model.apply)({"params": params}, image))
    assert found.shape == expected.shape and np.ptp(expected) > 1
    return np.abs(found - expected).max()


def test_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(RFDN()))) == 433_448


def test_equals_pytorch(tmp_path):
    network = torch_rfdn()
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", weights)
    image = np.random.default_rng(0).uniform(0, 255, (1, 27, 22, 3)).astype(np.float32)
    assert compare(network, tmp_path / "w.safetensors", image) < 1e-3


def test_published_weights_equal_pytorch(data_dir):
    photo = read_rgb(data_dir / "sr" / "set5" / "LR_x4" / "woman.png")[None, 20:60, 8:43].astype(np.float32)
    assert compare(torch_rfdn(), data_dir / "sr" / "weights" / "ntire2022_rfdn_baseline.safetensors", photo) < 1e-3


def test_small_image_is_refused():
    with pytest.raises(ValueError, match="at least 15 x 15"):
        jax.eval_shape(RFDN().init, jax.random.key(0), np.zeros((1, 15, 9, 3), np.float32))
