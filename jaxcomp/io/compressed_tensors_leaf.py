"""One linear layer in the formats of compressed-tensors: its tensors and its scheme, there and back.

`pack-quantized` (integer weights of 1 to 8 bits, activations in floating point or integers):

    weight_packed      int32 [N, ceil(K bits / 32)]   the codes of `QuantizedArray`, bit for bit
    weight_scale       float [N, G], or [1] per tensor
    weight_zero_point  int32 [ceil(N bits / 32), G]   asymmetric grids: the zero codes, packed along N
                       int8 [1]                       per tensor: zero - 2^(bits - 1)
    weight_shape       int64 [2]                      N, K

`int-quantized` (8-bit weights with quantized activations): `weight` int8 [N, K] = code - 2^7, and `weight_zero_point`
int8 like the scale. Static activations add `input_scale` [1] and, on asymmetric grids, `input_zero_point` int8 [1].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaf import is_compressed
from jaxcomp.formats import ActivationQuantizer, Grid, Layout, QuantizedArray, packing
from jaxcomp.io.files import CheckpointError

PACKED, INTEGER = "pack-quantized", "int-quantized"
_FLOATS = ("float32", "bfloat16", "float16")
_DEFAULTS = {"type": "int", "symmetric": True, "group_size": None, "strategy": None, "dynamic": False, "num_bits": 8}
# Options that tell how scales were found, not what they are.
_IGNORED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")

Take = Callable[[str, tuple[str, ...], tuple[int, ...]], np.ndarray]  # (name, dtypes, shape) -> checked tensor


def layout_of(path: str, shape: tuple[int, ...]) -> Layout:
    """The only layout the formats know: rows are outputs (or token ids), columns are inputs."""
    return Layout.of(shape, (0,) if path.endswith("/kernel") else (1,))


def scheme_of(path: str, leaf: Any) -> dict[str, Any]:
    """The `QuantizationScheme` of a leaf, without targets.

    Raises:
      CheckpointError: the formats cannot express the leaf.
    """
    if not isinstance(leaf, QuantizedArray):
        found = leaf.kind if is_compressed(leaf) else type(leaf).__name__
        raise _inexpressible(path, "a QuantizedArray or a dense array", found)
    if leaf.batch_ndim or leaf.layout != layout_of(path, leaf.shape):
        raise _inexpressible(path, "a matrix of outputs by inputs", f"layout {leaf.layout}, shape {leaf.shape}")
    if str(leaf.scale.dtype) not in _FLOATS:
        raise _inexpressible(path, f"scales of {_FLOATS}", str(leaf.scale.dtype))
    strategy = {0: "channel", -1: "tensor"}.get(leaf.grid.group_size, "group")
    weights = _arguments(leaf.grid, strategy, leaf.grid.group_size if strategy == "group" else None, False)
    inputs = None if leaf.act is None else _inputs(path, leaf.act)
    form = INTEGER if leaf.act is not None and leaf.grid.bits == 8 else PACKED
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def _inputs(path: str, act: ActivationQuantizer) -> dict[str, Any]:
    if act.grid.count != 2**act.grid.bits:
        raise _inexpressible(path, f"all {2**act.grid.bits} activation levels", f"{act.grid.levels}")
    if act.scale is not None and act.scale.ndim:
        raise _inexpressible(path, "one static activation scale", f"shape {act.scale.shape}")
    return _arguments(act.grid, "token" if act.scale is None else "tensor", None, act.scale is None)


def _arguments(grid: Grid, strategy: str, group_size: int | None, dynamic: bool) -> dict[str, Any]:
    shared = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric}
    return shared | {"strategy": strategy, "group_size": group_size, "dynamic": dynamic}


def _inexpressible(path: str, expected: str, found: str) -> CheckpointError:
    remedy = "quantize it within these limits, or save with `jaxcomp.io.orbax`"
    return CheckpointError("compressed-tensors", expected, found, remedy, path)


def encode(leaf: QuantizedArray, form: str) -> dict[str, np.ndarray]:
    """The tensors of a leaf that `scheme_of` accepts; fewer levels than 2^bits are stored as a part of the full grid."""
    bits, half = leaf.grid.bits, 2 ** (leaf.grid.bits - 1)
    shift = half - leaf.grid.count // 2 if leaf.grid.symmetric else 0  # moves the middle level to the code 2^(bits - 1)
    per_tensor = leaf.grid.group_size == -1
    tensors = {"weight_scale": leaf.scale.reshape(1) if per_tensor else leaf.scale}
    if form == INTEGER:
        tensors["weight"] = _signed(leaf.codes() + jnp.uint8(shift), bits)
    else:
        packed = packing.pack(leaf.codes() + jnp.uint8(shift), bits) if shift else leaf.stored_as("dense").packed
        tensors |= {
            "weight_packed": packed.view(jnp.int32),
            "weight_shape": np.array(leaf.layout.matrix_shape, np.int64),
        }
    if leaf.zero_point is not None:
        signed = form == INTEGER or per_tensor
        zero = leaf.zero_point.reshape(tensors["weight_scale"].shape)
        tensors["weight_zero_point"] = _signed(zero, bits) if signed else packing.pack(zero.T, bits).T.view(jnp.int32)
    if leaf.act is not None and leaf.act.scale is not None:
        tensors["input_scale"] = leaf.act.scale.reshape(1)
        if leaf.act.zero_point is not None:
            tensors["input_zero_point"] = _signed(leaf.act.zero_point.reshape(1), leaf.act.grid.bits)
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def decode(take: Take, scheme: Mapping[str, Any], layout: Layout, dtype: str) -> QuantizedArray:
    """The inverse of `encode`; `scheme` as `parse_scheme` returns it, `take` reads and checks the layer's tensors."""
    grid, (n, k) = scheme["grid"], layout.matrix_shape
    bits, per_tensor = grid.bits, grid.group_size == -1
    shape = (1, 1) if per_tensor else (n, grid.groups(k))
    scale = take("weight_scale", _FLOATS, (1,) if per_tensor else shape).reshape(shape)
    if scheme["format"] == INTEGER:
        packed = packing.pack(_unsigned(take("weight", ("int8",), (n, k)), bits), bits)
    else:
        stored = take("weight_packed", ("int32",), (n, packing.packed_words(k, bits)))
        packed = jnp.asarray(stored.view(np.uint32))
        if tuple(take("weight_shape", ("int64", "int32"), (2,))) != (n, k):
            raise ValueError(f"weight_shape is not ({n}, {k}), which config.json says")
    zero = None
    if not grid.symmetric and (scheme["format"] == INTEGER or per_tensor):
        zero = _unsigned(take("weight_zero_point", ("int8",), (1,) if per_tensor else shape), bits).reshape(shape)
    elif not grid.symmetric:
        words = take("weight_zero_point", ("int32",), (packing.packed_words(n, bits), shape[1]))
        zero = packing.unpack(jnp.asarray(words.view(np.uint32).T), bits, n).T
    act = None if scheme["act"] is None else _activation(take, *scheme["act"])
    return QuantizedArray(packed, jnp.array(scale), zero, act, layout, grid, dtype)


def _activation(take: Take, grid: Grid, dynamic: bool) -> ActivationQuantizer:
    if dynamic:
        return ActivationQuantizer(grid)
    scale = jnp.array(take("input_scale", _FLOATS, (1,))[0])
    if grid.symmetric:
        return ActivationQuantizer(grid, scale)
    zero = _unsigned(take("input_zero_point", ("int8",), (1,)), grid.bits)[0]
    return ActivationQuantizer(grid, scale, zero.astype(jnp.float32))


def _signed(codes, bits: int) -> np.ndarray:
    return (np.asarray(codes).astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _unsigned(codes: np.ndarray, bits: int):
    unsigned = codes.astype(np.int16) + 2 ** (bits - 1)
    if unsigned.min(initial=0) < 0 or unsigned.max(initial=0) >= 2**bits:
        raise ValueError(f"codes outside the {bits}-bit range")
    return jnp.asarray(unsigned.astype(np.uint8))


def parse_scheme(scheme: Mapping[str, Any], form: str) -> dict[str, Any]:
    """`{"format", "grid", "act": None or (grid, dynamic)}` of a scheme; `form` where it names no format of its own.

    Raises:
      ValueError: an option that the leaf types cannot express, or a malformed scheme.
    """
    form = scheme.get("format") or form
    if form not in (PACKED, INTEGER) or scheme.get("output_activations"):
        raise ValueError(f"expected {PACKED} or {INTEGER} without output_activations, found {form}")
    weights, inputs = _parse(scheme.get("weights")), scheme.get("input_activations")
    sizes = {"channel": 0, "tensor": -1, "group": weights["group_size"]}
    if weights["dynamic"] or weights["strategy"] not in sizes:
        raise ValueError(f"expected static weights per tensor, channel or group, found {weights}")
    grid = Grid(weights["num_bits"], 0, weights["symmetric"], sizes[weights["strategy"]])
    if form == INTEGER and grid.bits != 8:
        raise ValueError(f"expected 8 bits in {INTEGER}, found {grid.bits}")
    return {"format": form, "grid": grid, "act": None if inputs is None else _parse_inputs(_parse(inputs))}


def _parse_inputs(inputs: Mapping[str, Any]) -> tuple[Grid, bool]:
    if (inputs["strategy"], inputs["dynamic"]) not in (("token", True), ("tensor", False)):
        raise ValueError(f"expected activations per token and dynamic, or per tensor and static, found {inputs}")
    return Grid(inputs["num_bits"], 0, inputs["symmetric"]), inputs["dynamic"]


def _parse(found: object) -> dict[str, Any]:
    """Quantization arguments with their defaults, all types checked."""
    if not isinstance(found, dict):
        raise ValueError(f"expected quantization arguments, found {found!r}")
    extra = {name: value for name, value in found.items() if name not in (*_DEFAULTS, *_IGNORED) and value is not None}
    if extra and extra not in ({"actorder": "weight"}, {"actorder": "static"}):  # the order in which codes were found
        raise ValueError(f"expected no options but {sorted(_DEFAULTS)}, found {extra}")
    result = _DEFAULTS | {name: found[name] for name in _DEFAULTS if name in found}
    size = result["group_size"]
    if result["strategy"] is None:
        result["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    kinds = {"num_bits": int, "symmetric": bool, "dynamic": bool, "type": str, "strategy": str}
    if any(type(result[name]) is not kind for name, kind in kinds.items()) or result["type"] != "int":
        raise ValueError(f"expected integer quantization, found {found}")
    if result["strategy"] == "group" and (type(size) is not int or size < 1):
        raise ValueError(f"expected a positive group_size, found {size!r}")
    return result
