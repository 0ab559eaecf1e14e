"""Safetensors files as untrusted input: all is checked before an array exists, and data stay on disk."""

import difflib
import math
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxcomp.io.files import MAX_JSON_BYTES, CheckpointError, inside, parse_json, read_json, replacing

INDEX_NAME = "model.safetensors.index.json"
_DAMAGED = "the file is damaged; fetch it again"
_MAX_BYTES = 2**63 - 1
_MAX_RANK = 32
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


class _Entry(NamedTuple):
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class Safetensors:
    """Validated, memory-mapped tensors of one file or of several shards; a context manager.

    `read` returns read-only views into the mapping, valid as long as they live (also after `close`) and
    as long as no other program truncates the file.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[pathlib.Path, np.memmap] = {}

    def keys(self) -> list[str]:
        """Tensor names in the order of the data, shard by shard."""
        return list(self._entries)

    def info(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, without touching its data."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def file_of(self, name: str) -> pathlib.Path:
        """Path of the file that holds a tensor."""
        return self._entry(name).file

    def read(self, name: str, finite: bool = False) -> np.ndarray:
        """Zero-copy view of a tensor; `finite=True` also refuses NaN and infinity."""
        file, dtype, shape, offset = self._entry(name)
        if file not in self._maps:
            raise ValueError(f"{file}: already closed; read inside the `with` block")
        array = np.ndarray(shape, dtype, buffer=self._maps[file], offset=offset)
        return check_finite(name, array, file) if finite else array

    def close(self) -> None:
        """Drops this object's hold on the mapped files."""
        self._maps.clear()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=3)
            found = f"{len(self._entries)} others, the nearest {near}"
            raise CheckpointError(self.path, "the tensor to be present", found, "check the architecture", name)
        return self._entries[name]

    def _add(self, path: pathlib.Path) -> None:
        data = _map(path)
        header, start = _header(data, path)
        self.metadata |= _metadata(header.pop("__metadata__", {}), path)
        entries = _layout(header, start, data.size, path)
        for name in self._entries.keys() & entries.keys():
            found = f"also in {self._entries[name].file.name}"
            raise CheckpointError(path, "each tensor in one shard", found, "remove the stray shard", name)
        self._entries |= entries
        self._maps[path] = data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def open_safetensors(path) -> Safetensors:
    """Opens one file, validated whole; raises `CheckpointError`."""
    result = Safetensors(path)
    result._add(result.path)
    return result


def open_sharded(folder) -> Safetensors:
    """Opens a Hugging Face folder: by its index, else `model.safetensors`, else all `model-*.safetensors`.

    Raises:
      CheckpointError: a shard is invalid or outside the folder, or index and shards name different tensors.
    """
    result, weight_map = Safetensors(folder), None
    if (result.path / INDEX_NAME).exists():
        weight_map = _weight_map(inside(folder, INDEX_NAME))
        names = sorted(set(weight_map.values()))
    elif (result.path / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        names = sorted(path.name for path in result.path.glob("model-*.safetensors"))
    if not names:
        raise CheckpointError(folder, "model*.safetensors", "none", "convert the checkpoint to safetensors")
    for name in names:
        result._add(inside(folder, name))
    if weight_map is not None:
        _check_index(result, weight_map)
    return result


def save_safetensors(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
    """Writes arrays to one file, atomically; a dtype that the format lacks is a `CheckpointError`."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            expected = f"one of {sorted(DTYPES)}"
            raise CheckpointError(path, expected, str(array.dtype), "pack or convert it first", name)
    with replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, dict(metadata) if metadata else None)


def check_finite(name: str, array: np.ndarray, file="array") -> np.ndarray:
    """Returns `array`; NaN or infinity in it is a `CheckpointError` with their count and first index."""
    if array.dtype.kind in "biu":
        return array
    finite = np.isfinite(array)
    if finite.all():
        return array
    first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), array.shape))
    found = f"{finite.size - np.count_nonzero(finite)} NaN or infinite, first at {first}"
    raise CheckpointError(file, "finite numbers", found, "repair the checkpoint or train again", name)


def _map(path: pathlib.Path) -> np.memmap:
    if not os.path.isfile(path):  # unlike Path.is_file, false for a name too long
        raise CheckpointError(path, "a file", "none", "check the path")
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) < 10:
                raise CheckpointError(path, "at least 10 bytes", f"{size}", _DAMAGED)
            return np.memmap(file, np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(path, "a readable file", str(error), "check its permissions") from None


def _header(data: np.ndarray, path) -> tuple[dict, int]:
    """The parsed header object and the byte at which tensor data start."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    limit = min(MAX_JSON_BYTES, data.size - 8)
    if length > limit:
        raise CheckpointError(path, f"a header of at most {limit} bytes", f"{length}", _DAMAGED)
    raw = data[8 : 8 + length].tobytes()
    header = parse_json(raw, path) if raw[:1] == b"{" else None
    if not isinstance(header, dict):
        raise CheckpointError(path, "a header that is a JSON object", repr(raw[:20]), _DAMAGED)
    return header, 8 + length


def _metadata(found: object, path) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(path, "__metadata__ of strings", repr(found), "write the metadata as strings")
    return found


def _layout(header: dict, start: int, file_bytes: int, path) -> dict[str, _Entry]:
    """Entries in data order; the tensors must tile the bytes after the header exactly."""
    specs = {name: _spec(spec, name, path) for name, spec in header.items()}
    entries, position, available = {}, 0, file_bytes - start
    for name, (dtype, shape, begin, end) in sorted(specs.items(), key=lambda item: item[1][2:]):
        size = math.prod(shape) * dtype.itemsize
        if begin != position or end - begin != size or end > available:
            expected = f"{size} bytes at {position} within {available}"
            raise CheckpointError(path, expected, f"offsets [{begin}, {end}]", _DAMAGED, name)
        entries[name] = _Entry(path, dtype, shape, start + begin)
        position = end
    if position != available:
        raise CheckpointError(path, f"{position} bytes of data", f"{available}", _DAMAGED)
    return entries


def _spec(spec: object, name: str, path) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of one header entry, types and ranges checked."""
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(path, "the fields dtype, shape, data_offsets", repr(spec), _DAMAGED, name)
    code, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        remedy = "convert the tensor to one of these"
        raise CheckpointError(path, f"a dtype of {sorted(DTYPES)}", repr(code), remedy, name)
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(path, "two byte offsets", repr(offsets), _DAMAGED, name)
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(path, f"at most {_MAX_RANK} sizes >= 0", repr(shape), _DAMAGED, name)
    if math.prod(max(size, 1) for size in shape) * DTYPES[code].itemsize > _MAX_BYTES:
        raise CheckpointError(path, f"at most {_MAX_BYTES} bytes", repr(shape), _DAMAGED, name)
    return DTYPES[code], tuple(shape), *offsets


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_BYTES for item in value)


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    index = read_json(path)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(path, "weight_map from tensor to file", repr(found), "fetch the index again")
    return found


def _check_index(shards: Safetensors, weight_map: dict[str, str]) -> None:
    """The index must name exactly the tensors that the shards hold, each in its shard."""
    held = {name: shards.file_of(name).name for name in shards.keys()}
    for name in sorted(held.keys() | weight_map.keys()):
        listed, found = weight_map.get(name, "no shard"), held.get(name, "no shard")
        if listed != found:
            remedy = "index and shards differ; fetch both again"
            raise CheckpointError(shards.path / INDEX_NAME, f"in {listed}", f"in {found}", remedy, name)
