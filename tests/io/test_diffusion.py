"""Diffusers folders give the outputs of Diffusers; TAEF2 reconstructs real images; bad files are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.data.images import read_rgb
from jaxcomp.evaluate.restoration import psnr, to_uint8
from jaxcomp.io.diffusion import dit_config, load_diffusers_dit, load_taef2
from jaxcomp.io.dit import load_dit, save_dit
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.safetensors import open_safetensors, save_safetensors
from jaxcomp.models.dit import DiT, init_params
from jaxcomp.models.dit_config import DiTConfig

DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=3,
    out_channels=6,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=5,
    attention_bias=True,
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
)
WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=3,
    out_channels=3,
    text_dim=10,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
SMALL = DiTConfig((4, 4), 2, (2, 2), 8, 1, 2, 16, num_classes=3)


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("diffusers")
    return pytest.importorskip("torch")


def published(torch, name, config, folder):
    """A random model of Diffusers, its weights not at zero, saved."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    for key, parameter in model.named_parameters():
        if "proj_out" in key or "norm" in key or "bias" in key or "scale_shift" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    if name.startswith("DiT"):
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    model.save_pretrained(folder)
    return model


def test_dit_matches_diffusers(torch, tmp_path):
    theirs = published(torch, "DiTTransformer2DModel", DIT, tmp_path)
    config, params = load_diffusers_dit(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    t, y = np.array([3, 750]), np.array([4, 5])
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(y)).sample
    model = DiT(config)

    @jax.jit
    def run(params, x, t, y):
        h, c = model.apply({"params": params}, x, t, y, method="embed")
        h = model.apply({"params": params}, h, c, method="trunk")
        return model.apply({"params": params}, h, c, True, method="head")

    found = run(params, x, t.astype(np.float32), y.astype(np.int32))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_wan_matches_diffusers(torch, tmp_path, per_token):
    theirs = published(torch, "WanTransformer3DModel", WAN, tmp_path)
    config, params = load_diffusers_dit(tmp_path, size=(2, 4, 6))
    rng = np.random.default_rng(0)
    x, text = (rng.normal(size=s).astype(np.float32) for s in ((2, 2, 4, 6, 3), (2, 5, 10)))
    t = rng.integers(0, 1000, (2, config.num_tokens) if per_token else 2)
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 4, 1, 2, 3), torch.tensor(t), torch.tensor(text)).sample
    found = jax.jit(DiT(config).apply)({"params": params}, x, t.astype(np.float32), text)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 4, 1).numpy(), atol=1e-4)


def test_copies_that_differ_are_refused(torch, tmp_path):
    published(torch, "DiTTransformer2DModel", DIT, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with open_safetensors(file) as tensors:
        arrays = {name: np.array(tensors.read(name)) for name in tensors.keys()}
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    save_safetensors(file, arrays | {name: arrays[name] + 1})
    with pytest.raises(CheckpointError, match="which all blocks share"):
        load_diffusers_dit(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"activation_fn": "geglu"}, "gelu-approximate"),
        ({"sample_size": 7}, "not divisible"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    hf = {"_class_name": "DiTTransformer2DModel", **DIT} | change
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=message):
        load_diffusers_dit(tmp_path)


def test_wan_needs_a_size():
    with pytest.raises(ValueError, match="size="):
        dit_config({"_class_name": "WanTransformer3DModel", **WAN, "eps": 1e-6})


def test_own_folder_round_trips_and_is_checked(tmp_path):
    params = init_params(SMALL, jax.random.key(0))
    save_dit(tmp_path / "a", SMALL, params, {"command": "none"})
    config, again = load_dit(tmp_path / "a")
    assert config == SMALL
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(CheckpointError, match="new or empty folder"):
        save_dit(tmp_path / "a", SMALL, params, {})
    params["out"]["bias"] = params["out"]["bias"].at[0].set(jnp.nan)
    save_dit(tmp_path / "nan", SMALL, params, {})
    with pytest.raises(CheckpointError, match="out/bias"):
        load_dit(tmp_path / "nan")
    save_dit(tmp_path / "extra", SMALL, params | {"more": jnp.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="more"):
        load_dit(tmp_path / "extra")
    (tmp_path / "a" / "config.json").write_text('{"size": [4]}')
    with pytest.raises(CheckpointError, match="fields of a DiTConfig"):
        load_dit(tmp_path / "a")


def test_taef2_reconstructs_real_images(data_dir):
    (encoder, encoder_params), (decoder, decoder_params) = load_taef2(
        data_dir / "vae" / "taef2_encoder.safetensors", data_dir / "vae" / "taef2_decoder.safetensors"
    )
    image = read_rgb(data_dir / "sr" / "set5" / "HR" / "butterfly.png")[:128, :128]

    @jax.jit
    def reconstruct(x):
        latents = encoder.apply({"params": encoder_params}, x)
        return latents, decoder.apply({"params": decoder_params}, latents)

    latents, found = reconstruct(jnp.asarray(image[None], jnp.float32) / 255)
    assert latents.shape == (1, 16, 16, 32)
    assert psnr(to_uint8(found[0], 1.0), image, border=0, channel="rgb") > 25
    with pytest.raises(ValueError, match="multiples of 8"):
        encoder.apply({"params": encoder_params}, jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(CheckpointError):
        load_taef2(data_dir / "vae" / "taef2_decoder.safetensors", data_dir / "vae" / "taef2_decoder.safetensors")
