"""Folders of a `DiT`: `config.json`, `model.safetensors` with param paths as tensor names, and a record of the training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcomp.io.files import CheckpointError, inside, new_folder, read_json, write_json
from jaxcomp.io.safetensors import open_safetensors, save_safetensors
from jaxcomp.models.dit import init_params
from jaxcomp.models.dit_config import DiTConfig

_REMEDY = "config.json and weights differ; take both from one folder"


def param_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every param of `DiT(config)` by path."""
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def save_dit(folder, config: DiTConfig, params: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes a folder that `load_dit` reads, with `record` as `training.json`; it appears whole or not at all.

    Raises:
      CheckpointError: `folder` holds files.
    """
    tensors = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    with new_folder(folder) as temporary:
        save_safetensors(temporary / "model.safetensors", tensors)
        write_json(temporary / "config.json", dataclasses.asdict(config))
        write_json(temporary / "training.json", dict(record))


def load_dit(folder) -> tuple[DiTConfig, dict[str, Any]]:
    """(config, float32 params) of such a folder.

    Raises:
      CheckpointError: a file is missing or damaged, or a tensor is missing, unknown, of another shape or not finite.
    """
    path = inside(folder, "config.json")
    found = read_json(path)
    try:
        config = DiTConfig(**found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, "the fields of a DiTConfig", str(error), "fetch the file again") from error
    with open_safetensors(inside(folder, "model.safetensors")) as tensors:
        shapes, params = param_shapes(config), {}
        if extra := sorted(set(tensors.keys()) - shapes.keys()):
            raise CheckpointError(tensors.path, f"{len(shapes)} tensors", f"{len(extra)} more", _REMEDY, extra[0])
        for name, shape in shapes.items():
            if tensors.info(name)[1] != shape:
                raise CheckpointError(tensors.path, f"shape {shape}", f"{tensors.info(name)[1]}", _REMEDY, name)
            params[name] = jnp.asarray(tensors.read(name, finite=True), jnp.float32)
    return config, unflatten_dict(params, sep="/")
