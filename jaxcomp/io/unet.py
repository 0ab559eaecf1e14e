"""U-Nets of Stable Diffusion 1.x from Diffusers folders."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.io.diffusion import open_diffusers
from jaxcomp.io.files import CheckpointError, inside, read_json
from jaxcomp.io.torch_layout import read_params
from jaxcomp.models.unet import UNet, UNetConfig

_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_TOP = {
    "time/up": "time_embedding.linear_1",
    "time/down": "time_embedding.linear_2",
    "stem": "conv_in",
    "out_norm": "conv_norm_out",
    "out": "conv_out",
}
_RES = {"norm_0": "norm1", "norm_1": "norm2", "conv_0": "conv1", "conv_1": "conv2", "time": "time_emb_proj"}
_RES |= {"skip": "conv_shortcut"}
_BLOCK = "transformer_blocks.0"
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_TRANSFORMER = {
    "norm": "norm",
    "in": "proj_in",
    "out": "proj_out",
    "attn_norm": f"{_BLOCK}.norm1",
    "cross_norm": f"{_BLOCK}.norm2",
    "mlp_norm": f"{_BLOCK}.norm3",
    "up": f"{_BLOCK}.ff.net.0.proj",
    "down": f"{_BLOCK}.ff.net.2",
    **{f"attn/{ours}": f"{_BLOCK}.attn1.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{f"cross/{ours}": f"{_BLOCK}.attn2.{theirs}" for ours, theirs in _PROJECTIONS.items()},
}
_UNSUPPORTED = {  # option: the only value
    "use_linear_projection": (None, False),
    "transformer_layers_per_block": (None, 1),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "resnet_time_scale_shift": (None, "default"),
    "norm_eps": (None, 1e-5),
    "act_fn": (None, "silu"),
}


def unet_config(hf: Mapping[str, Any]) -> UNetConfig:
    """Architecture from the `config.json` of a `UNet2DConditionModel` of the Stable Diffusion 1.x kind.

    Raises:
      ValueError: another class or an unsupported option.
      KeyError: an option is missing.
    """
    if hf.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(f"_class_name: expected UNet2DConditionModel, found {hf.get('_class_name')!r}")
    for name, allowed in _UNSUPPORTED.items():
        if hf.get(name) not in allowed:
            raise ValueError(f"{name}: expected {allowed[-1]!r}, found {hf[name]!r}")
    if hf["in_channels"] != hf["out_channels"] or not isinstance(hf["attention_head_dim"], int):
        raise ValueError("expected as many input as output channels, and one number of heads for all levels")
    return UNetConfig(
        channels=hf["in_channels"],
        widths=tuple(hf["block_out_channels"]),
        layers=hf["layers_per_block"],
        attention=tuple(kind.startswith("CrossAttn") for kind in hf["down_block_types"]),
        num_heads=hf["attention_head_dim"],  # so named in published configs
        text_size=hf["cross_attention_dim"],
        groups=hf["norm_num_groups"],
    )


def load_unet(folder) -> tuple[UNetConfig, dict[str, Any]]:
    """(config, float32 params of `UNet(config)`) of a Diffusers folder.

    Raises:
      CheckpointError: a file is missing, damaged or of another architecture, or a tensor does not fit.
    """
    path = inside(folder, "config.json")
    hf = read_json(path)
    try:
        config = unet_config(hf)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "the config of a Stable Diffusion 1.x U-Net"
        raise CheckpointError(path, expected, f"{error}", "choose a supported checkpoint") from error
    with open_diffusers(folder) as tensors:
        return config, read_params(tensors, param_shapes(config), lambda param: tensor_name(param, config))


def param_shapes(config: UNetConfig) -> dict[str, Any]:
    """Abstract params of `UNet(config)`."""
    size = 2 ** (len(config.widths) - 1)
    shapes = ((1, size, size, config.channels), (1,), (1, 1, config.text_size))
    example = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(UNet(config).init, jax.random.key(0), *example)["params"]


def tensor_name(path: str, config: UNetConfig) -> str:
    """Tensor of a Diffusers file for a param path."""
    module, _, leaf = path.rpartition("/")
    if module in _TOP:
        return f"{_TOP[module]}.{_LEAF[leaf]}"
    first, _, rest = module.partition("/")
    if first == "mid_end":
        return f"mid_block.resnets.1.{_RES[rest]}.{_LEAF[leaf]}"
    where, index = _place(first, config)
    part, _, inner = rest.partition("/")
    if part == "res":
        return f"{where}.resnets.{index}.{_RES[inner]}.{_LEAF[leaf]}"
    if part == "transformer":
        return f"{where}.attentions.{index}.{_TRANSFORMER[inner]}.{_LEAF[leaf]}"
    sampler = "upsamplers" if first.startswith("up") else "downsamplers"
    return f"{where}.{sampler}.0.conv.{_LEAF[leaf]}"


def _place(name: str, config: UNetConfig) -> tuple[str, int]:
    """(block, index in it) of a layer: up blocks count from the bottom, their layers consume skips from the newest."""
    if name == "mid":
        return "mid_block", 0
    kind, number = re.fullmatch(r"(down|up)_(\d+)", name).groups()
    per_level = config.layers + 1
    if kind == "down":
        return f"down_blocks.{int(number) // per_level}", int(number) % per_level
    order = config.skips - 1 - int(number)
    return f"up_blocks.{order // per_level}", order % per_level


__all__ = ["load_unet", "param_shapes", "tensor_name", "unet_config"]
