"""Params of a Linen model from tensors in PyTorch's layouts: convolutions OIHW, linear maps [out, in]."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcomp.io.files import CheckpointError
from jaxcomp.io.safetensors import Safetensors, open_safetensors

_TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # [out, in] -> [in, out]; OIHW -> HWIO
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_REMEDY = "load the checkpoint into the architecture that it was made for"


def torch_name(path: str, modules: dict[str, str]) -> str:
    """Tensor name of a param path: each module as in `modules` (else unchanged), joined by dots."""
    *prefix, leaf = path.split("/")
    return ".".join([*(modules.get(part, part) for part in prefix), _LEAF_NAMES.get(leaf, leaf)])


def open_torch(path) -> Safetensors:
    """Opens a safetensors file; raises `CheckpointError`, also for pickled files, which are never read."""
    if pathlib.Path(path).suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl"):
        remedy = "convert it with safetensors.torch.save_file: reading a pickle runs code"
        raise CheckpointError(path, "a .safetensors file", "a pickled checkpoint", remedy)
    return open_safetensors(path)


def read_params(tensors: Safetensors, shapes: dict[str, Any], name_of: Callable[[str], str]) -> dict[str, Any]:
    """Params of a model from its tensors, float32.

    Args:
      tensors: the opened file.
      shapes: tree of the model's params, abstract or not.
      name_of: tensor name of a param path.

    Raises:
      CheckpointError: a tensor is missing, superfluous, of another shape, not floating or not finite.
    """
    flat = flatten_dict(shapes, sep="/")
    names = {path: name_of(path) for path in flat}
    params = {path: _read(tensors, names[path], leaf.shape) for path, leaf in flat.items()}
    if extra := sorted(set(tensors.keys()) - set(names.values())):
        raise CheckpointError(tensors.path, f"{len(names)} tensors", f"{len(extra)} more", _REMEDY, extra[0])
    return unflatten_dict(params, sep="/")


def to_torch(leaf: Any, dtype) -> np.ndarray:
    """A Flax kernel or bias in PyTorch's order of axes."""
    return np.transpose(np.asarray(leaf, dtype), np.argsort(_TO_FLAX[len(leaf.shape)]))


def _read(tensors: Safetensors, name: str, shape: tuple[int, ...]) -> jax.Array:
    axes = _TO_FLAX[len(shape)]
    expected = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
    dtype, found = tensors.info(name)
    if found != expected:
        raise CheckpointError(tensors.path, f"shape {expected}", f"{found}", _REMEDY, name)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CheckpointError(tensors.path, "a float dtype", f"{dtype}", "dequantize it", name)
    return jnp.asarray(np.transpose(tensors.read(name, finite=True), axes), jnp.float32)
