"""Hugging Face folders of quantized Llama-family models in the formats of compressed-tensors, for `transformers` and vLLM."""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tokenizers
from flax.traverse_util import unflatten_dict

from jaxcomp.core.leaf import is_compressed, leaves_with_paths
from jaxcomp.io.compressed_tensors_leaf import PACKED, decode, encode, layout_of, parse_scheme, scheme_of
from jaxcomp.io.files import CheckpointError, inside, new_folder, read_json, write_json
from jaxcomp.io.huggingface import hf_name, param_shapes
from jaxcomp.io.safetensors import INDEX_NAME, Safetensors, open_sharded, save_safetensors
from jaxcomp.models.llama import unstack_layers
from jaxcomp.models.llama_config import LlamaConfig


def save_pretrained(
    folder,
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = 5_000_000_000,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Writes a folder whose quantized layers stay packed; it appears whole or not at all.

    `params`: dense arrays and `QuantizedArray`s, of either layout of `Llama`. Decompressed there, every weight equals
    `materialise()` bit for bit if the scales have the dtype of the model (runtimes keep scales in that dtype). Dynamic
    activations are named per token and integer; their rounding is the runtime's.

    Raises:
      CheckpointError: a leaf cannot be expressed (the message names it and why), or `folder` holds files.
    """
    leaves = leaves_with_paths(unstack_layers(params) if "blocks" in params else params)
    _check_shapes(folder, config, leaves)
    schemes = {path: scheme_of(path, leaf) for path, leaf in leaves.items() if is_compressed(leaf)}
    if config.tie_embeddings and "embed/embedding" in schemes:
        remedy = "keep the embedding dense, or untie the head"
        raise CheckpointError(folder, "a dense tied embedding", "a quantized one", remedy, "embed/embedding")
    dtype = jax.numpy.dtype(leaves["final_norm/scale"].dtype).name
    hf = config.to_hf() | {"torch_dtype": dtype, "quantization_config": _quantization_config(config, leaves, schemes)}
    shards = _plan(leaves, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with new_folder(folder) as temporary:
        weight_map, total = {}, 0
        for name, paths in zip(names, shards, strict=True):
            tensors = {key: t for path in paths for key, t in _tensors(path, leaves[path], config, schemes).items()}
            save_safetensors(temporary / name, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        write_json(temporary / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
        write_json(temporary / "config.json", hf)


def load_pretrained(folder, *, dtype: Any = None) -> tuple[LlamaConfig, dict[str, Any]]:
    """Reads such a folder, ours or another tool's, into a param tree with `QuantizedArray` leaves.

    `dtype`: of dense params and the logical dtype of quantized ones; None is the one config.json names.

    Raises:
      CheckpointError: a file is invalid, a tensor is missing, unknown, not finite or of another shape, or the
        quantization has no counterpart here.
    """
    path = inside(folder, "config.json")
    config, dtype, quantization = _parse_config(read_json(path), dtype, path)
    with open_sharded(folder) as tensors:
        reader = _Reader(tensors)
        if config.num_layers > len(reader.unused):
            expected = f"tensors of {config.num_layers} layers"
            raise CheckpointError(folder, expected, f"{len(reader.unused)} tensors", "fetch the model again")
        params = {}
        for name, shape in param_shapes(config).items():
            module = hf_name(name, config).removesuffix(".weight")
            if f"{module}.weight_scale" in reader.unused:
                params[name] = _quantized(reader, module, layout_of(name, shape), dtype, quantization, path)
            else:
                stored = shape[::-1] if name.endswith("/kernel") else shape
                dense = reader.take(hf_name(name, config), ("float32", "bfloat16", "float16"), stored)
                params[name] = jax.numpy.array(dense.T if name.endswith("/kernel") else dense, dtype)
        reader.finish(config)
    return config, unflatten_dict(params, sep="/")


class _Reader:
    """Takes tensors out of a file with their dtype, shape and finiteness checked, and knows what is left."""

    def __init__(self, tensors: Safetensors):
        self.tensors, self.unused = tensors, set(tensors.keys())

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        dtype, found = self.tensors.info(name)
        if dtype.name not in dtypes or found != shape:
            expected, remedy = f"{' or '.join(dtypes)} {shape}", "config.json and weights differ; fetch both again"
            raise CheckpointError(self.tensors.file_of(name), expected, f"{dtype} {found}", remedy, name)
        self.unused.discard(name)
        return self.tensors.read(name, finite=True)

    def finish(self, config: LlamaConfig) -> None:
        """Refuses tensors that nothing took, except the copy of a tied head."""
        for name in sorted(self.unused - ({"lm_head.weight"} if config.tie_embeddings else set())):
            file, remedy = self.tensors.file_of(name), "this checkpoint has parts that no leaf type can hold"
            raise CheckpointError(file, f"only tensors of a {config.family} decoder", "one more", remedy, name)


def _quantized(reader: _Reader, module: str, layout, dtype: str, quantization: Mapping[str, Any], path):
    take = lambda name, dtypes, shape: reader.take(f"{module}.{name}", dtypes, shape)
    try:
        return decode(take, _scheme_for(module, quantization), layout, dtype)
    except CheckpointError:
        raise
    except ValueError as error:
        remedy = "requantize it to integers per tensor, channel or group"
        raise CheckpointError(path, "a supported quantization", str(error), remedy, module) from error


def _check_shapes(folder, config: LlamaConfig, leaves: Mapping[str, Any]) -> None:
    shapes = param_shapes(config)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    for path in sorted(path for path in shapes.keys() | found.keys() if shapes.get(path) != found.get(path)):
        remedy = "pass the config that made these params"
        raise CheckpointError(folder, f"shape {shapes.get(path)}", f"{found.get(path)}", remedy, path)


def _tensors(path: str, leaf: Any, config: LlamaConfig, schemes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    name = hf_name(path, config)
    if path in schemes:
        local = encode(leaf, schemes[path]["format"])
        return {f"{name.removesuffix('.weight')}.{key}": tensor for key, tensor in local.items()}
    dense = np.asarray(leaf)
    return {name: dense.T if path.endswith("/kernel") else dense}


def _plan(leaves: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
    shards, size = [[]], 0
    for path, leaf in leaves.items():
        if shards[-1] and size + leaf.nbytes > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(path)
        size += leaf.nbytes
    return shards


def _quantization_config(config: LlamaConfig, leaves: Mapping[str, Any], schemes: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of equal schemes: "Linear" if there is one scheme, else module by module; dense layers are ignored."""
    module = lambda path: hf_name(path, config).removesuffix(".weight")
    groups: dict[str, list[str]] = {}
    for path, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme), []).append(module(path))
    if len(groups) == 1:
        groups = {
            key: ["Linear", *(m for m in modules if m == "model.embed_tokens")] for key, modules in groups.items()
        }
    dense = [path for path in leaves if path.endswith("/kernel") and path not in schemes]
    formats = sorted({scheme["format"] for scheme in schemes.values()}) or [PACKED]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": json.loads(key) | {"targets": t} for i, (key, t) in enumerate(groups.items())},
        "ignore": [*map(module, dense), *(["lm_head"] if config.tie_embeddings else [])],
    }


def _parse_config(hf: object, dtype: Any, path) -> tuple[LlamaConfig, str, Mapping[str, Any]]:
    """Architecture, dtype name and quantization_config of a config.json."""
    remedy = "choose a supported checkpoint"
    quantization = hf.get("quantization_config") if isinstance(hf, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        raise CheckpointError(path, "a quantization_config of compressed-tensors", repr(quantization), remedy)
    name = hf.get("torch_dtype") or hf.get("dtype") or "float32" if dtype is None else jax.numpy.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(path, "torch_dtype float32, bfloat16 or float16", repr(name), remedy)
    try:
        config = LlamaConfig.from_hf({key: value for key, value in hf.items() if key != "quantization_config"})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(path, "a supported text decoder", str(error), remedy) from error
    return config, name, quantization


def _scheme_for(module: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The scheme of a module: by its name, else by a pattern, else by its class.

    Raises:
      ValueError: no group targets the module, or the groups are malformed.
    """
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"config_groups must be an object of objects, found {groups!r}")
    targets = [(target, group) for group in groups.values() for target in group.get("targets") or ()]
    if not all(isinstance(target, str) for target, _ in targets):
        raise ValueError("targets must be strings")
    kind = "Embedding" if module == "model.embed_tokens" else "Linear"
    for matches in (lambda t: t == module, lambda t: _matches(t, module), lambda t: t == kind):
        for target, group in targets:
            if matches(target):
                return parse_scheme(group, quantization.get("format"))
    raise ValueError(f"no group of quantization_config targets {module}")


def _matches(target: str, module: str) -> bool:
    """Whether a "re:" target matches; patterns that could take exponential time are refused."""
    if not target.startswith("re:"):
        return False
    pattern = target.removeprefix("re:")
    if len(pattern) > 500 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise ValueError(f"target {target!r} is too intricate; name the modules instead")
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"target {target!r}: {error}") from None
