"""The small trained video model that ships with the package; `experiments/train_video_dit.py` made it."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.io.files import CheckpointError, read_json, replacing, write_json
from jaxcomp.io.safetensors import open_safetensors, save_safetensors
from jaxcomp.models.video_dit import VideoDiT, VideoDiTConfig

FOLDER = pathlib.Path(__file__).parent / "assets" / "video"


def save_video_dit(folder: pathlib.Path, config: VideoDiTConfig, params: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`, params in float16."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.asarray(leaf, np.float16) for path, leaf in leaves_with_paths(params).items()}
    save_safetensors(folder / "model.safetensors", arrays)
    with replacing(folder / "config.json") as temporary:
        write_json(temporary, dataclasses.asdict(config))


def load_video_dit(folder: pathlib.Path = FOLDER) -> tuple[VideoDiT, dict[str, Any]]:
    """(model, float32 params) of a folder that `save_video_dit` wrote; by default of the shipped model.

    Raises:
      CheckpointError: a file is absent or damaged, or the tensors are not those of the config.
    """
    folder = pathlib.Path(folder)
    try:
        model = VideoDiT(VideoDiTConfig(**read_json(folder / "config.json")))
    except (TypeError, ValueError) as error:
        remedy = "fetch the file again"
        raise CheckpointError(folder / "config.json", "the fields of VideoDiTConfig", str(error), remedy) from None
    tokens = jnp.zeros((1, 1, model.config.chunk_tokens, model.config.token_channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, jnp.ones((1, 1)))["params"]
    with open_safetensors(folder / "model.safetensors") as file:
        expected = {path: leaf.shape for path, leaf in leaves_with_paths(shapes).items()}
        found = {name: file.info(name)[1] for name in file.keys()}
        if differ := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
            name = differ[0]
            remedy = "use the config.json that was written beside it"
            raise CheckpointError(file.path, f"shape {expected.get(name)}", f"{found.get(name)}", remedy, name)
        arrays = {name: jnp.asarray(file.read(name, finite=True), jnp.float32) for name in expected}
    return model, unflatten_dict(arrays, sep="/")
