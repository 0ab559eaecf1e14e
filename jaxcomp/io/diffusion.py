"""Published diffusion checkpoints: DiT and Wan transformers in the layout of Diffusers, and the tiny auto-encoder TAEF2."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxcomp.io.dit import param_shapes
from jaxcomp.io.files import CheckpointError, inside, read_json
from jaxcomp.io.safetensors import Safetensors, open_safetensors, open_sharded
from jaxcomp.io.torch_layout import read_params
from jaxcomp.models.dit_config import DiTConfig
from jaxcomp.models.vae import STRIDE, TinyDecoder, TinyEncoder

_REMEDY = "config.json and weights differ; fetch both from one model"
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_EMBEDDING = "norm1.emb"  # Diffusers keeps one copy of the condition's embedding in every block of a DiT
_DIT = {
    "patch": "pos_embed.proj",
    "time/up": f"transformer_blocks.0.{_EMBEDDING}.timestep_embedder.linear_1",
    "time/down": f"transformer_blocks.0.{_EMBEDDING}.timestep_embedder.linear_2",
    "label": f"transformer_blocks.0.{_EMBEDDING}.class_embedder.embedding_table",
    "head_modulation/linear": "proj_out_1",
    "out": "proj_out_2",
}
_DIT_BLOCK = {
    "modulation/linear": "norm1.linear",
    "mlp/up": "ff.net.0.proj",
    "mlp/down": "ff.net.2",
    **{f"attn/{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
}
_WAN = {
    "patch": "patch_embedding",
    "time/up": "condition_embedder.time_embedder.linear_1",
    "time/down": "condition_embedder.time_embedder.linear_2",
    "time_modulation": "condition_embedder.time_proj",
    "text/up": "condition_embedder.text_embedder.linear_1",
    "text/down": "condition_embedder.text_embedder.linear_2",
    "out": "proj_out",
}
_WAN_BLOCK = {
    "mlp/up": "ffn.net.0.proj",
    "mlp/down": "ffn.net.2",
    "cross_norm": "norm2",
    **{f"attn/{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross/{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}


def dit_config(hf: Mapping[str, Any], size: tuple[int, ...] | None = None) -> DiTConfig:
    """Architecture from the `config.json` of a `DiTTransformer2DModel` or `WanTransformer3DModel`.

    Args:
      hf: its contents.
      size: of an input in latents; a Wan model takes any (frames, height, width) and needs it.

    Raises:
      ValueError: another class (FLUX and other two-stream transformers have no place in a `DiT`), or an unsupported option.
      KeyError: an option is missing.
    """
    name = hf.get("_class_name")
    if name == "DiTTransformer2DModel":
        return _dit_config(hf)
    if name == "WanTransformer3DModel":
        return _wan_config(hf, size)
    raise ValueError(f"_class_name: expected DiTTransformer2DModel or WanTransformer3DModel, found {name!r}")


def _dit_config(hf: Mapping[str, Any]) -> DiTConfig:
    if (
        hf.get("activation_fn") != "gelu-approximate"
        or not hf.get("attention_bias")
        or hf.get("norm_elementwise_affine")
    ):
        raise ValueError("expected activation_fn gelu-approximate, attention_bias and no norm_elementwise_affine")
    hidden = hf["num_attention_heads"] * hf["attention_head_dim"]
    return DiTConfig(
        size=(hf["sample_size"],) * 2,
        channels=hf["in_channels"],
        patch=(hf["patch_size"],) * 2,
        hidden_size=hidden,
        num_layers=hf["num_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_size=4 * hidden,
        out_channels=hf.get("out_channels") or hf["in_channels"],
        num_classes=hf["num_embeds_ada_norm"],
        frequency_shift=1.0,
        mlp_norm_eps=hf.get("norm_eps", 1e-5),
    )


def _wan_config(hf: Mapping[str, Any], size: tuple[int, ...] | None) -> DiTConfig:
    if hf.get("image_dim") or hf.get("added_kv_proj_dim") or not hf.get("cross_attn_norm", True):
        raise ValueError("expected a text-to-video model (no image_dim, no added_kv_proj_dim) with cross_attn_norm")
    if size is None:
        raise ValueError("a Wan transformer takes any size; pass size=(frames, height, width) of the latents")
    return DiTConfig(
        size=size,
        channels=hf["in_channels"],
        patch=tuple(hf["patch_size"]),
        hidden_size=hf["num_attention_heads"] * hf["attention_head_dim"],
        num_layers=hf["num_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_size=hf["ffn_dim"],
        out_channels=hf.get("out_channels") or hf["in_channels"],
        text_size=hf["text_dim"],
        frequency_size=hf["freq_dim"],
        position="rope",
        modulation="table",
        qk_norm=True,
        norm_eps=hf["eps"],
    )


def load_diffusers_dit(folder, size: tuple[int, ...] | None = None) -> tuple[DiTConfig, dict[str, Any]]:
    """(config, float32 params of `DiT(config)`) of a Diffusers folder: `config.json` and safetensors, sharded or not.

    Raises:
      CheckpointError: a file is missing, damaged or of another architecture; a tensor is missing, unknown, of another shape or
        not finite; or the blocks of a DiT embed the condition differently.
    """
    path = inside(folder, "config.json")
    hf = read_json(path)
    try:
        config = dit_config(hf, size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "the config of a DiT or Wan transformer of Diffusers"
        raise CheckpointError(path, expected, f"{error}", "choose a supported checkpoint") from error
    with open_diffusers(folder) as tensors:
        names = {param: tensor_name(param, config) for param in param_shapes(config)}
        copies = _check_copies(tensors, config)
        fixed = {"pos_embed.pos_embed"}  # a table that follows from the config
        if extra := sorted(set(tensors.keys()) - set(names.values()) - copies - fixed):
            raise CheckpointError(tensors.path, f"{len(names)} tensors", f"{len(extra)} more", _REMEDY, extra[0])
        shapes = param_shapes(config)
        params = {param: _read(tensors, name, shapes[param]) for param, name in names.items()}
    return config, unflatten_dict(params, sep="/")


def tensor_name(path: str, config: DiTConfig) -> str:
    """Tensor of a Diffusers file for a param path."""
    wan = config.modulation == "table"
    block = re.match(r"blocks_(\d+)/", path)
    prefix = f"{'blocks' if wan else 'transformer_blocks'}.{block[1]}." if block else ""
    rest = path[block.end() :] if block else path
    module, _, leaf = rest.rpartition("/")
    if leaf == "table":
        return f"{prefix}scale_shift_table"
    modules = (_WAN_BLOCK if wan else _DIT_BLOCK) if block else (_WAN if wan else _DIT)
    return f"{prefix}{modules[module]}.{_LEAF[leaf]}"


def open_diffusers(folder) -> Safetensors:
    """Opens the weights of a Diffusers folder: one file, or as `open_sharded` finds them."""
    single = "diffusion_pytorch_model.safetensors"
    return open_safetensors(inside(folder, single)) if inside(folder, single).exists() else open_sharded(folder)


def _check_copies(tensors: Safetensors, config: DiTConfig) -> set[str]:
    """Names of the further copies of the condition's embedding; all must equal the first."""
    copies = set()
    for name in tensors.keys():
        if (found := re.fullmatch(rf"transformer_blocks\.(\d+)\.({re.escape(_EMBEDDING)}\..*)", name)) and found[
            1
        ] != "0":
            first = f"transformer_blocks.0.{found[2]}"
            if not np.array_equal(tensors.read(name), tensors.read(first)):
                expected = f"the values of {first}, which all blocks share"
                raise CheckpointError(tensors.file_of(name), expected, "others", "load a converted DiT", name)
            copies.add(name)
    return copies if config.modulation == "linear" else set()


def _read(tensors: Safetensors, name: str, shape: tuple[int, ...]) -> jax.Array:
    """A tensor in our layout: [out, in] maps transposed, patch convolutions as maps of patches, tables with more axes."""
    dtype, found = tensors.info(name)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CheckpointError(tensors.file_of(name), "a float dtype", f"{dtype}", "dequantize it", name)
    array = tensors.read(name, finite=True).astype(np.float32)
    if array.ndim >= 4:  # [out, in, *patch] -> [*patch, in, out]
        array = np.transpose(array, (*range(2, array.ndim), 1, 0)).reshape(-1, found[0])
    elif array.ndim == 2 and not name.endswith("embedding_table.weight"):
        array = array.T
    elif array.ndim == 3:
        array = array[None]
    if array.shape != shape:
        raise CheckpointError(tensors.file_of(name), f"a tensor for {shape}", f"{found}", _REMEDY, name)
    return jnp.asarray(array)


def load_taef2(encoder_file, decoder_file) -> tuple[tuple[nn.Module, dict], tuple[nn.Module, dict]]:
    """((TinyEncoder, params), (TinyDecoder, params)) of the published files, float32.

    Raises:
      CheckpointError: a file is damaged or holds another network.
    """
    encoder, decoder = TinyEncoder(), TinyDecoder()
    image = jax.ShapeDtypeStruct((1, STRIDE, STRIDE, 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, 1, 1, encoder.latent_channels), jnp.float32)
    return (
        (encoder, _read_sequence(encoder_file, encoder, image, _taef2_encoder())),
        (decoder, _read_sequence(decoder_file, decoder, latent, _taef2_decoder())),
    )


def _read_sequence(file, model: nn.Module, example: Any, index: dict[str, int]) -> dict[str, Any]:
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    parts = {"conv_0": "conv.0", "conv_1": "conv.2", "conv_2": "conv.4"}
    parts |= {"pool_expand": "pool.0", "pool_norm": "pool.1", "pool_reduce": "pool.3"}

    def name_of(path: str) -> str:
        first, *inner, leaf = path.split("/")
        return ".".join([str(index[first]), *(parts[part] for part in inner), _LEAF[leaf]])

    with open_safetensors(file) as tensors:
        return read_params(tensors, shapes, name_of)


def _taef2_encoder() -> dict[str, int]:
    """Position of each module in the published sequence."""
    stages = {f"down_{i}": 2 + 4 * i for i in range(3)}
    blocks = {f"block_{i}_{j}": 3 + 4 * i + j for i in range(3) for j in range(3)}
    return {"stem": 0, "block": 1, **stages, **blocks, "out": 14}


def _taef2_decoder() -> dict[str, int]:
    stages = {f"up_{i}": 7 + 5 * i for i in range(3)}
    blocks = {f"block_{i}_{j}": 3 + 5 * i + j for i in range(3) for j in range(3)}
    return {"stem": 1, **blocks, **stages, "block": 18, "out": 19}


__all__ = ["dit_config", "load_diffusers_dit", "load_taef2", "tensor_name"]
