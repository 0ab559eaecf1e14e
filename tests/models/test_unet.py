"""The U-Net gives the outputs of Diffusers, hides its depth behind `around`, refuses bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.io.files import CheckpointError
from jaxcomp.io.unet import load_unet, param_shapes, tensor_name
from jaxcomp.models.unet import UNet, UNetConfig
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.cache.deepcache import deepcache
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.network import network

CONFIG = UNetConfig(channels=2, widths=(8, 16), layers=1, attention=(True, False), num_heads=2, text_size=6, groups=4)
HF = dict(
    sample_size=4,
    in_channels=2,
    out_channels=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=6,
    attention_head_dim=2,
    norm_num_groups=4,
)
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
T, TEXT = jnp.array([3.0, 700.0]), jax.random.normal(jax.random.key(1), (2, 3, 6))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), param_shapes(CONFIG))


def test_unet_matches_diffusers(tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**HF).eval()
    for key, parameter in theirs.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    config, params = load_unet(tmp_path)
    assert config == CONFIG
    to_torch = lambda a: torch.tensor(np.asarray(a))
    with torch.no_grad():
        expected = theirs(to_torch(X).permute(0, 3, 1, 2), to_torch(T), to_torch(TEXT)).sample
    found = jax.jit(UNet(config).apply)({"params": params}, X, T, TEXT)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_trunk_is_a_recursion_over_the_skips(params):
    names = []

    def around(name, fn, h):
        names.append(name)
        return fn(h)

    found = jax.jit(lambda p: UNet(CONFIG).apply({"params": p}, X, T, TEXT, around))(params)
    assert names == ["inner_1", "inner_2", "inner_3", "mid"] and found.shape == X.shape


def test_deepcache_keeps_what_lies_below_the_first_skip(params):
    solver = solvers.ddim(schedules.vp_grid(schedules.scaled_linear_betas(), 4, "leading"))
    denoiser = network(UNet(CONFIG))

    def draw(policy):
        return jax.jit(lambda p, x: sample(denoiser, p, x, TEXT, solver, policy=policy)[0])(params, X)

    whole = draw(None)
    np.testing.assert_allclose(draw(deepcache(np.ones(4, bool), "inner_1")), whole, atol=1e-5)
    half = draw(deepcache(np.array([True, False, True, False]), "inner_1"))
    assert 0 < float(jnp.abs(half - whole).max()) < float(jnp.abs(whole).max())


def test_every_param_has_a_tensor_of_its_own():
    flat = jax.tree_util.tree_flatten_with_path(param_shapes(CONFIG))[0]
    names = [tensor_name(jax.tree_util.keystr(path, simple=True, separator="/"), CONFIG) for path, _ in flat]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("change", [{"_class_name": "Other"}, {"use_linear_projection": True}, {"norm_num_groups": 3}])
def test_other_architectures_are_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **HF} | change))
    with pytest.raises(CheckpointError, match="U-Net"):
        load_unet(tmp_path)


def test_bad_input_is_refused(params):
    run = lambda x, text: UNet(CONFIG).apply({"params": params}, x, T, text, method="embed")
    with pytest.raises(ValueError, match="multiples of 2"):
        run(X[:, :3], TEXT)
    with pytest.raises(ValueError, match="encode the prompt"):
        run(X, None)
    with pytest.raises(ValueError, match="per level"):
        UNetConfig(attention=(True,))
