"""DITN against a PyTorch module written from its description; its exact rewrites; its locality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.io.safetensors import open_safetensors, save_safetensors
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.io.torch_layout import read_params, torch_name
from jaxcomp.models.ditn import (
    DITN,
    PreNorm,
    channel_attention,
    ditn,
    ditn_real,
    ditn_tiny,
    fold,
    merge_norm,
    substitute_norm,
    unfold,
)

SMALL = dict(channels=12, inner_layers=2, spatial_layers=1, scale=2)


def torch_ditn(channels, units, inner, spatial, scale, norm, unit_conv, patch=8):
    """The network in PyTorch, modules named as ours with dots for slashes."""
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            name, layer = (
                ("layer", nn.LayerNorm(channels)) if norm == "layer" else ("mix", nn.Conv2d(channels, channels, 1))
            )
            setattr(self, name, layer)

        def forward(self, x):
            if norm == "tanh":
                return self.mix(torch.tanh(x))
            return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(channels, 3 * channels)
            self.temperature = nn.Parameter(torch.full((1,), 1.7))
            self.out = nn.Conv2d(channels, channels, 1, bias=False)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).chunk(3, dim=-1)
            logits = F.normalize(q, dim=1).transpose(1, 2) @ F.normalize(k, dim=1) * self.temperature
            y = v @ logits.softmax(dim=-1).transpose(1, 2)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            pieces = {
                "in": nn.Conv2d(channels, 2 * channels, 1),
                "local": nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
                "dilated": nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels),
                "mix": nn.Conv2d(channels, channels, 1),
                "out": nn.Conv2d(channels, channels, 1),
            }
            for name, module in pieces.items():
                self.add_module(name, module)
            self.gamma = nn.Parameter(torch.randn(channels))

        def forward(self, x):
            a, gate = getattr(self, "in")(x).chunk(2, dim=1)
            return self.gamma[None, :, None, None] * self.out(gate * self.mix(self.dilated(self.local(a))))

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("in", nn.Conv2d(channels, 4 * channels, 1, bias=False))
            self.depthwise = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels, bias=False)
            self.out = nn.Conv2d(2 * channels, channels, 1, bias=False)

        def forward(self, x):
            a, b = self.depthwise(getattr(self, "in")(x)).chunk(2, dim=1)
            return self.out(F.gelu(a) * b)

    class Block(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.branch = branch
            self.add_module(branch, Attention() if branch == "attn" else Spatial())
            self.add_module(f"{branch}_norm", Norm())
            self.mlp, self.mlp_norm = FeedForward(), Norm()

        def forward(self, x):
            x = x + getattr(self, self.branch)(getattr(self, f"{self.branch}_norm")(x))
            return x + self.mlp(self.mlp_norm(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.trunk = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
            self.upsample = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
            for u in range(units):
                for i in range(inner):
                    self.add_module(f"units_{u}_inner_{i}", Block("attn"))
                for i in range(spatial):
                    self.add_module(f"units_{u}_spatial_{i}", Block("spatial"))
                if unit_conv:
                    self.add_module(f"units_{u}_conv", nn.Conv2d(channels, channels, 3, padding=1))

        def unit(self, u, x):
            n, c, height, width = x.shape
            h, w = height // patch, width // patch
            x = x.reshape(n, c, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, patch, patch)
            for i in range(inner):
                x = getattr(self, f"units_{u}_inner_{i}")(x)
            x = x.reshape(n, h, w, c, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)
            for i in range(spatial):
                x = getattr(self, f"units_{u}_spatial_{i}")(x)
            return getattr(self, f"units_{u}_conv")(x) if unit_conv else x

        def forward(self, x):
            height, width = x.shape[2:]
            x = F.pad(x, (0, -width % patch, 0, -height % patch), mode="reflect")
            head = y = self.head(x)
            for u in range(units):
                y = self.unit(u, y)
            y = F.pixel_shuffle(self.upsample(self.trunk(y) + head), scale)
            return y[:, :, : height * scale, : width * scale]

    torch.manual_seed(0)
    return Network().eval()


def random_params(model, seed=1, spread=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, spread, x.shape), x.dtype), param_shapes(model))


def image(height, width, batch=1):
    return np.random.default_rng(0).uniform(0, 1, (batch, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("scale, expected", [(2, 424_636), (3, 432_751), (4, 444_112)])
def test_parameters_of_the_released_network(scale, expected):
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(ditn_real(scale)))) == expected


def test_presets_differ_as_described():
    names = lambda model: {name.rsplit("_", 1)[0] for name in param_shapes(model) if name.startswith("units")}
    assert names(ditn_tiny()) == {"units_0_inner", "units_0_spatial"}
    assert {"units_2_inner", "units_2_spatial", "units_0", "units_2"} < names(ditn())
    assert "layer" in param_shapes(ditn_tiny())["units_0_inner_3"]["attn_norm"]


@pytest.mark.parametrize(
    "units, inner, spatial, scale, norm, unit_conv", [(1, 4, 4, 4, "tanh", False), (2, 1, 2, 3, "layer", True)]
)
def test_equals_pytorch(units, inner, spatial, scale, norm, unit_conv, tmp_path):
    network = torch_ditn(20, units, inner, spatial, scale, norm, unit_conv)
    import torch

    weights = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", weights)
    model = DITN(20, units, inner, spatial, scale=scale, norm=norm, unit_conv=unit_conv)
    with open_safetensors(tmp_path / "w.safetensors") as tensors:
        params = read_params(tensors, param_shapes(model), lambda path: torch_name(path, {}))
    x = image(21, 29, batch=2)
    with torch.no_grad():
        expected = network(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = jax.jit(model.apply)({"params": params}, x)
    assert found.shape == (2, 21 * scale, 29 * scale, 3) and np.ptp(expected) > 0.1
    assert 255 * np.abs(found - expected).max() < 1e-3


def test_merged_norm_equals_tanh_norm():
    params = random_params(DITN(**SMALL, norm="tanh"))
    merged = merge_norm(params)
    x = image(19, 24)
    expected = jax.jit(DITN(**SMALL, norm="tanh").apply)({"params": params}, x)
    found = jax.jit(DITN(**SMALL, norm="merged").apply)({"params": merged}, x)
    shapes = jax.tree.map(jnp.shape, merged)
    assert shapes == jax.tree.map(jnp.shape, param_shapes(DITN(**SMALL, norm="merged")))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_substituted_norm_is_scale_times_tanh_plus_bias():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 6)), jnp.float32)
    scale, bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)), jnp.float32)
    params = substitute_norm({"block": {"attn_norm": {"layer": {"scale": scale, "bias": bias}}}})
    found = PreNorm("tanh").apply({"params": params["block"]["attn_norm"]}, x)
    expected = np.tanh(x) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layer_form_turns_into_the_merged_form():
    params = merge_norm(substitute_norm(random_params(DITN(**SMALL))))
    shapes = jax.tree.map(jnp.shape, param_shapes(DITN(**SMALL, norm="merged")))
    assert jax.tree.map(jnp.shape, params) == shapes


def test_attention_against_loops():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 9, 4)) for _ in range(3))
    q[0, :, 1] = 0  # the norm of a flat patch
    expected = np.zeros_like(v)
    unit = lambda column: column / max(np.linalg.norm(column), 1e-12)
    for n, c in np.ndindex(2, 4):
        logits = np.array([1.5 * unit(q[n, :, c]) @ unit(k[n, :, d]) for d in range(4)])
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[n, :, c] = v[n] @ weights
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    found = channel_attention(*map(as_float, (q, k, v)), as_float([1.5]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradient_of_a_flat_patch_is_finite():
    flat = jnp.zeros((1, 9, 4))
    gradient = jax.grad(lambda q: channel_attention(q, flat, flat + 1, jnp.ones((1,))).sum())(flat)
    assert np.isfinite(gradient).all()


def test_unfold_and_fold_are_inverse():
    x = jnp.asarray(image(16, 24, batch=2))
    patches = unfold(x, 8)
    assert patches.shape == (2 * 2 * 3, 8, 8, 3)
    np.testing.assert_array_equal(patches[4], x[0, 8:16, 8:16])
    np.testing.assert_array_equal(fold(patches, 16, 24), x)


def changed(model, x, at):
    """Output pixels that move with one input pixel."""
    params = random_params(model)
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    return np.argwhere(np.any(apply(x) != apply(x.at[0, *at].add(1.0)), axis=(0, 3)))


def test_inner_layers_stay_in_their_patch_but_for_the_convolutions():
    model = DITN(8, inner_layers=2, spatial_layers=0, scale=1)
    moved = changed(model, jnp.asarray(image(32, 32)), (12, 12))
    assert moved.min() == 8 - 2 and moved.max() == 15 + 2


def test_receptive_radius_bounds_what_a_pixel_sees():
    model = DITN(8, inner_layers=1, spatial_layers=1, scale=1)
    moved = changed(model, jnp.asarray(image(64, 64)), (31, 31))
    assert model.receptive_radius == 22
    assert np.abs(moved - 31).max() == 22


def test_padding_is_reflection_and_is_cropped():
    model = DITN(8, inner_layers=1, spatial_layers=1, scale=2)
    params = random_params(model)
    x = image(13, 21)
    padded = np.pad(x, ((0, 0), (0, 3), (0, 3), (0, 0)), mode="reflect")
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    np.testing.assert_allclose(apply(x), apply(padded)[:, :26, :42], atol=1e-5)
    assert model.min_size == 5 and jax.eval_shape(apply, image(5, 5)).shape == (1, 10, 10, 3)
    with pytest.raises(ValueError, match="at least 5 x 5 pixels, found 4 x 20"):
        apply(image(4, 20))
