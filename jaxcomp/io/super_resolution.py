"""Published super-resolution checkpoints: which network each is, and how its tensors are named."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxcomp.data.text import ASSETS
from jaxcomp.io.safetensors import save_safetensors
from jaxcomp.io.torch_layout import open_torch, read_params, to_torch, torch_name
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import RLFN, rlfn_ntire, rlfn_s

_ESA = {"reduce": "conv1", "skip": "conv_f", "stride": "conv2", "expand": "conv4"}
_CONVS = {f"conv_{i}": f"c{i + 1}_r" for i in range(3)} | {"fuse": "c5", "upsample": "upsampler.0"}
_CHALLENGE = {f"blocks_{i}": f"B{i + 1}" for i in range(6)} | {"head": "fea_conv", "trunk": "LR_conv"}
_AUTHORS = {f"blocks_{i}": f"block_{i + 1}" for i in range(6)} | {"head": "conv_1", "trunk": "conv_2"}
_RLFN_BLOCK = _ESA | _CONVS | {"pooled_0": "conv3"}
_RFDN = (
    _CHALLENGE
    | _ESA
    | _CONVS
    | {"pooled_0": "conv_max", "pooled_1": "conv3", "pooled_2": "conv3_", "conv_3": "c4", "merge": "c.0"}
    | {f"distill_{i}": f"c{i + 1}_d" for i in range(3)}
)
_IMDN = (
    {f"blocks_{i}": f"model.1.sub.{i}" for i in range(8)}
    | {"head": "model.0", "trunk": "model.1.sub.8", "upsample": "model.2", "fuse": "conv1x1"}
    | {"conv_0": "conv1.0", "conv_1": "conv2.0", "conv_2": "conv3.0", "conv_3": "conv4"}
)


class Published(NamedTuple):
    """A network and the module names, one dictionary per repository, under which its tensors are published."""

    model: Callable[[], nn.Module]
    names: tuple[dict[str, str], ...]


_RLFN = (_RLFN_BLOCK | _AUTHORS, _RLFN_BLOCK | _CHALLENGE)
PUBLISHED = {
    "rlfn_x4": Published(RLFN, _RLFN),
    "rlfn_x2": Published(lambda: RLFN(scale=2), _RLFN),
    "rlfn_s_x4": Published(rlfn_s, _RLFN),
    "rlfn_s_x2": Published(lambda: rlfn_s(2), _RLFN),
    "rlfn_small_x4": Published(lambda: RLFN(24, 24, 4, 8, data_range=1.0), _RLFN),  # ours, ships with the package
    "rlfn_ntire_x4": Published(rlfn_ntire, _RLFN),
    "imdn_ntire_x4": Published(IMDN, (_IMDN,)),
    "rfdn_ntire_x4": Published(RFDN, (_RFDN,)),
}

SMALL = ASSETS / "sr" / "rlfn_small_x4.safetensors"  # trained as configs/sr/embedded.py says


def param_shapes(model: nn.Module) -> dict[str, Any]:
    """Abstract params of a super-resolution network."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def load_super_resolver(name: str, path) -> tuple[nn.Module, dict[str, Any]]:
    """(network, float32 params) of a published checkpoint; `name` is a key of `PUBLISHED`.

    Raises:
      ValueError: the name is unknown.
      CheckpointError: the file is damaged, pickled or holds another network.
    """
    model = _published(name).model()
    with open_torch(path) as tensors:
        held = set(tensors.keys())
        naming = max(PUBLISHED[name].names, key=lambda names: torch_name("head/kernel", names) in held)
        return model, read_params(tensors, param_shapes(model), lambda param: torch_name(param, naming))


def save_super_resolver(
    name: str, path, params: Mapping[str, Any], dtype="float32", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes params as the checkpoint `name` is published: the inverse of `load_super_resolver`, up to the dtype.

    Raises:
      ValueError: the name is unknown, or the params are those of another network.
    """
    published = _published(name)
    flat, expected = (flatten_dict(tree, sep="/") for tree in (params, param_shapes(published.model())))
    shapes = lambda leaves: {param: tuple(leaf.shape) for param, leaf in leaves.items()}
    if differ := sorted({param for param, _ in shapes(flat).items() ^ shapes(expected).items()}):
        raise ValueError(f"params are not those of {name}: {differ[0]} differs; choose the name of their network")
    tensors = {torch_name(param, published.names[0]): to_torch(leaf, dtype) for param, leaf in flat.items()}
    save_safetensors(path, tensors, metadata)


def _published(name: str) -> Published:
    if name not in PUBLISHED:
        raise ValueError(f"model {name!r} is unknown; expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
