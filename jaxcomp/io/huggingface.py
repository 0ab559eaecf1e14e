"""Hugging Face folders of dense Llama-family checkpoints, streamed one tensor at a time."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcomp.io.files import CheckpointError, inside, new_folder, read_json, write_json
from jaxcomp.io.safetensors import INDEX_NAME, Safetensors, open_sharded, save_safetensors
from jaxcomp.models.llama import Llama, unstack_layers
from jaxcomp.models.llama_config import LlamaConfig

_TOP = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    **{f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"attn/{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_LLAMA_NORMS = {"mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
# Values that follow from config.json or from other tensors; some published files hold them all the same.
_REDUNDANT = ("rotary_emb.inv_freq",)

Sharder = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def hf_name(path: str, config: LlamaConfig) -> str:
    """Tensor name in a Hugging Face file for a param path; kernels are stored there as [out, in]."""
    if path in _TOP:
        return _TOP[path]
    block, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    modules = _MODULES | (_GEMMA_NORMS if config.traits.gemma else _LLAMA_NORMS)
    kind = "bias" if leaf == "bias" else "weight"
    return f"model.layers.{block.removeprefix('blocks_')}.{modules[module]}.{kind}"


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every param of `Llama(config)` by path."""
    one_layer = Llama(dataclasses.replace(config, num_layers=1, layer_types=None))
    params = jax.eval_shape(one_layer.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    block = {path: shape for path, shape in shapes.items() if path.startswith("blocks_0/")}
    layers = range(1, config.num_layers)
    return shapes | {p.replace("_0/", f"_{i}/", 1): shape for i in layers for p, shape in block.items()}


def load_config(folder) -> LlamaConfig:
    """Reads `config.json`; raises `CheckpointError` when it is absent, damaged or of another architecture."""
    path = inside(folder, "config.json")
    hf = read_json(path)
    try:
        return LlamaConfig.from_hf(hf)
    except (AttributeError, TypeError, ValueError) as error:
        expected = "the config of a dense Llama, Mistral, Qwen 2/3 or Gemma 2/3 text decoder"
        raise CheckpointError(path, expected, str(error), "choose a supported checkpoint") from error


def load_pretrained(
    folder, *, dtype: Any = None, sharding: Sharder | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads a folder (`config.json`, safetensors with or without index) into a `Llama` param tree.

    One tensor at a time goes from the mapped file to its devices, each device reading its own slice only, so the
    host holds one slice besides. `dtype`: None keeps the file's. `sharding(path, shape)`: where a param lives;
    None is the default device.

    Raises:
      CheckpointError: a file is invalid, or a tensor is missing, unknown, or of another shape.
    """
    config = load_config(folder)
    with open_sharded(folder) as tensors:
        shapes = _checked_shapes(config, tensors)
        params = {}
        for path, shape in shapes.items():
            view = tensors.read(hf_name(path, config))
            view = view.T if path.endswith("/kernel") else view
            where = None if sharding is None else sharding(path, shape)
            params[path] = _to_device(view, dtype, where)
    return config, unflatten_dict(params, sep="/")


def _checked_shapes(config: LlamaConfig, tensors: Safetensors) -> dict[str, tuple[int, ...]]:
    """`param_shapes`, after comparing them with what the files hold."""
    remedy = "config.json and weights differ; fetch both from one model"
    names = set(tensors.keys())
    if config.num_layers > len(names):
        expected = f"{config.num_layers} layers of several tensors each"
        raise CheckpointError(tensors.path, expected, f"{len(names)} tensors", remedy)
    shapes = param_shapes(config)
    for path, shape in shapes.items():
        name = hf_name(path, config)
        shape = shape[::-1] if path.endswith("/kernel") else shape
        dtype, found = tensors.info(name)
        if found != shape:
            raise CheckpointError(tensors.file_of(name), f"shape {shape}", f"{found}", remedy, name)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise CheckpointError(tensors.file_of(name), "a float dtype", f"{dtype}", "dequantize it", name)
    redundant = (*_REDUNDANT, *(["lm_head.weight"] if config.tie_embeddings else []))
    extra = names - {hf_name(path, config) for path in shapes}
    for name in sorted(name for name in extra if not name.endswith(redundant)):
        expected = f"only tensors of a {config.family} decoder of {config.num_layers} layers"
        raise CheckpointError(tensors.file_of(name), expected, "one more", remedy, name)
    return shapes


def _to_device(view: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Copies slice after slice; `jax.make_array_from_callback` would hold all of them in host memory at once."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(np.array(view, dtype, order="C")))
    placed = sharding.addressable_devices_indices_map(view.shape).items()
    slice_of = lambda item: str(item[1])
    pieces = []
    for _, replicas in itertools.groupby(sorted(placed, key=slice_of), slice_of):
        devices, indices = zip(*replicas, strict=True)
        piece = np.array(view[indices[0]], dtype, order="C")
        pieces += jax.block_until_ready([jax.device_put(piece, device) for device in devices])
    return jax.make_array_from_single_device_arrays(view.shape, sharding, pieces)


def save_pretrained(
    folder,
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = 5_000_000_000,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Writes a folder that `load_pretrained` and `transformers` read; it appears whole or not at all.

    `params`: dense, of either layout of `Llama`. `shard_bytes`: a file takes tensors up to this size, at least one;
    one file's tensors are in host memory at a time.

    Raises:
      CheckpointError: a param is missing, unknown, compressed or of another shape, or `folder` holds files.
    """
    params = flatten_dict(unstack_layers(params) if "blocks" in params else params, sep="/")
    _check_params(folder, config, params)
    shards = _plan_shards(params, shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = ["model.safetensors"] if len(shards) == 1 else files
    dtype = jnp.dtype(params["embed/embedding"].dtype).name
    with new_folder(folder) as temporary:
        for file, paths in zip(files, shards, strict=True):
            tensors = {hf_name(path, config): _to_host(path, params[path]) for path in paths}
            save_safetensors(temporary / file, tensors, {"format": "pt"})
        if len(shards) > 1:
            held = {hf_name(path, config): file for file, paths in zip(files, shards, strict=True) for path in paths}
            total = sum(leaf.nbytes for leaf in params.values())
            write_json(temporary / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": held})
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "config.json", config.to_hf() | {"torch_dtype": dtype})


def _check_params(folder, config: LlamaConfig, params: Mapping[str, Any]) -> None:
    shapes = param_shapes(config)
    for path in sorted(shapes.keys() | params.keys()):
        expected = f"shape {shapes[path]}" if path in shapes else "no such param"
        leaf = params.get(path)
        found = "nothing" if leaf is None else f"shape {leaf.shape}"
        if path not in shapes or leaf is None or leaf.shape != shapes[path]:
            raise CheckpointError(folder, expected, found, "pass the config that made these params", path)
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            remedy = "materialise it, or save in a format for compressed weights"
            raise CheckpointError(folder, "a dense array", type(leaf).__name__, remedy, path)


def _plan_shards(params: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
    shards, size = [[]], 0
    for path, leaf in params.items():
        if shards[-1] and size + leaf.nbytes > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(path)
        size += leaf.nbytes
    return shards


def _to_host(path: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.T if path.endswith("/kernel") else array


def load_tokenizer(folder) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.json`; raises `CheckpointError` when it is absent or damaged."""
    path = inside(folder, "tokenizer.json")
    read_json(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(path, "a tokenizer", str(error), "fetch the file again") from error
