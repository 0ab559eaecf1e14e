"""The manifest of a checkpoint: what every leaf is, which arrays it holds, and the digest of every file.

Orbax stores arrays only; the class and the static fields of a compressed leaf live here. Schema, version 1:

    {"format": "jaxcomp-checkpoint", "version": 1, "sha256": digest of all the rest,
     "arrays": folder, "meta": {...},
     "leaves": {path: {"kind": name, "statics": {...}, "arrays": {component: {"dtype", "shape", "bytes"}}}},
     "files": {path below the arrays folder: {"bytes", "sha256"}}}
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcomp.core.leaf import is_compressed, leaf_kinds
from jaxcomp.io.files import CheckpointError, is_plain_name, read_json, replacing
from jaxcomp.io.safetensors import DTYPES

NAME = "manifest.json"
FORMAT = "jaxcomp-checkpoint"
VERSION = 1
ARRAY = "array"  # the kind of a plain array; its one component is "value"
_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
_DAMAGED = "the manifest is damaged or newer than this reader; fetch the checkpoint again"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Dtype and shape of a stored array."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Kind (a name of `leaf_kinds`, or "array"), static fields and component arrays of a leaf."""

    kind: str
    statics: Mapping[str, Any]
    arrays: Mapping[str, ArraySpec]


@dataclasses.dataclass(frozen=True)
class FileSpec:
    """Size and digest of a file."""

    nbytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint but the numbers."""

    arrays: str
    leaves: Mapping[str, LeafSpec]
    files: Mapping[str, FileSpec]
    meta: Mapping[str, Any]


def describe(params: Mapping[str, Any]) -> tuple[dict[str, LeafSpec], dict[tuple[str, str], Any]]:
    """Specs by path, and arrays by (path, component), of a nested dict of arrays and compressed leaves.

    Raises:
      CheckpointError: a key is not a plain name, or a leaf is neither an array nor compressed.
    """
    specs, arrays = {}, {}
    for path, leaf in _flatten(params, ()):
        kind, parts, statics = ARRAY, {"value": leaf}, {}
        if is_compressed(leaf):
            kind, parts, statics = leaf.kind, leaf.components(), plain(leaf.statics(), path)
        specs[path] = LeafSpec(kind, statics, {name: _spec_of(path, name, array) for name, array in parts.items()})
        arrays |= {(path, name): array for name, array in parts.items()}
    return specs, arrays


def assemble(leaves: Mapping[str, LeafSpec], arrays: Mapping[tuple[str, str], Any], file) -> dict[str, Any]:
    """The inverse of `describe`; over `ShapeDtypeStruct`s it checks a manifest before any array is read."""
    params: dict[str, Any] = {}
    for path, spec in leaves.items():
        *parents, key = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError(file, "a tree", f"a leaf above {path!r}", _DAMAGED)
        if key in node:
            raise CheckpointError(file, "a tree", f"a leaf and a subtree at {path!r}", _DAMAGED)
        node[key] = _leaf(spec, {name: arrays[path, name] for name in spec.arrays}, path, file)
    return params


def plain(value: Any, what: str) -> Any:
    """`value` as JSON gives it back (tuples become lists); `CheckpointError` if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(what, "values that JSON can hold", str(error), "convert them") from None


def write(folder, manifest: Manifest) -> None:
    """Writes the manifest atomically; it makes the checkpoint valid, so it comes last."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "arrays": manifest.arrays,
        "meta": dict(manifest.meta),
        "leaves": {path: _leaf_json(spec) for path, spec in manifest.leaves.items()},
        "files": {name: {"bytes": spec.nbytes, "sha256": spec.sha256} for name, spec in manifest.files.items()},
    }
    with replacing(pathlib.Path(folder) / NAME) as temporary:
        temporary.write_text(json.dumps(body | {"sha256": _digest(body)}, indent=1), encoding="utf-8")


def read(folder) -> Manifest:
    """Reads and checks the manifest of a checkpoint folder; raises `CheckpointError`."""
    path = pathlib.Path(folder) / NAME
    if not path.is_file():
        remedy = "the save did not finish, or this is no jaxcomp checkpoint"
        raise CheckpointError(path, "a manifest", "none", remedy)
    fields = {
        "format": str,
        "version": int,
        "arrays": str,
        "meta": dict,
        "leaves": dict,
        "files": dict,
        "sha256": str,
    }
    body = _object(read_json(path), fields, "manifest", path)
    if (body["format"], body["version"]) != (FORMAT, VERSION):
        found = f"{body['format']!r} version {body['version']}"
        raise CheckpointError(path, f"{FORMAT!r} version {VERSION}", found, "use the jaxcomp that wrote it")
    if body.pop("sha256") != (digest := _digest(body)):
        raise CheckpointError(path, f"the recorded digest to be {digest}", "another", _DAMAGED)
    if not is_plain_name(body["arrays"]):
        raise CheckpointError(path, "a plain folder name", repr(body["arrays"]), _DAMAGED)
    leaves = {name: _parse_leaf(name, found, path) for name, found in body["leaves"].items()}
    files = {name: _parse_file(name, found, path) for name, found in body["files"].items()}
    return Manifest(body["arrays"], leaves, files, body["meta"])


def _flatten(node: Any, parents: tuple[str, ...]):
    """Pairs (path, leaf) of nested mappings."""
    path = "/".join(parents)
    if isinstance(node, Mapping):
        if not node:
            raise CheckpointError("params", "leaves", f"an empty dict at {path!r}", "remove it")
        for key, child in node.items():
            if not is_plain_name(key):
                raise CheckpointError("params", "keys without separators", f"{key!r} in {path!r}", "rename the key")
            yield from _flatten(child, (*parents, key))
    elif is_compressed(node) or (hasattr(node, "shape") and hasattr(node, "dtype")):
        yield path, node
    else:
        remedy = "store it in `meta`" if isinstance(node, int | float | str) else "use nested dicts of arrays"
        raise CheckpointError("params", "an array, a compressed leaf or a dict", f"{type(node)}", remedy, path)


def _spec_of(path: str, component: str, array) -> ArraySpec:
    name = str(array.dtype)
    if name not in _BY_NAME:
        raise CheckpointError("params", f"a dtype of {sorted(_BY_NAME)}", name, "convert it", f"{path}:{component}")
    return ArraySpec(_BY_NAME[name], tuple(int(size) for size in array.shape))


def _leaf(spec: LeafSpec, parts: dict[str, Any], path: str, file):
    if spec.kind == ARRAY:
        return parts["value"]
    try:
        return leaf_kinds()[spec.kind].from_parts(parts, spec.statics)
    except Exception as error:  # forged statics may fail anywhere in a leaf class
        raise CheckpointError(file, f"the parts of a {spec.kind}", f"{error!r}", _DAMAGED, path) from error


def _leaf_json(spec: LeafSpec) -> dict[str, Any]:
    arrays = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "bytes": array.nbytes}
        for name, array in spec.arrays.items()
    }
    return {"kind": spec.kind, "statics": dict(spec.statics), "arrays": arrays}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _object(found: object, fields: dict[str, type], what: str, file, leaf: str | None = None) -> dict[str, Any]:
    """`found` if it is an object of exactly these fields and types."""
    if not isinstance(found, dict) or found.keys() != fields.keys():
        raise CheckpointError(file, f"{what} with fields {sorted(fields)}", repr(found), _DAMAGED, leaf)
    for name, kind in fields.items():
        if type(found[name]) is not kind:
            expected = f"{name} of {what} to be a {kind.__name__}"
            raise CheckpointError(file, expected, repr(found[name]), _DAMAGED, leaf)
    return found


def _parse_leaf(path: str, found: object, file) -> LeafSpec:
    if not all(map(is_plain_name, path.split("/"))):
        raise CheckpointError(file, "plain names joined by /", repr(path), _DAMAGED)
    _object(found, {"kind": str, "statics": dict, "arrays": dict}, "leaf", file, path)
    kind, known = found["kind"], {ARRAY, *leaf_kinds()}
    if kind not in known:
        raise CheckpointError(file, f"a kind of {sorted(known)}", repr(kind), "update jaxcomp", path)
    arrays = {name: _parse_array(name, spec, path, file) for name, spec in found["arrays"].items()}
    if kind == ARRAY and (arrays.keys() != {"value"} or found["statics"]):
        raise CheckpointError(file, "one component `value` and no statics", repr(found), _DAMAGED, path)
    return LeafSpec(kind, found["statics"], arrays)


def _parse_array(name: str, found: object, path: str, file) -> ArraySpec:
    _object(found, {"dtype": str, "shape": list, "bytes": int}, f"array {name!r}", file, path)
    shape, dtype = found["shape"], _BY_NAME.get(found["dtype"])
    valid = is_plain_name(name) and dtype is not None and len(shape) <= 32
    if not valid or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise CheckpointError(file, "a known dtype and sizes >= 0", f"{name!r}: {found!r}", _DAMAGED, path)
    spec = ArraySpec(dtype, tuple(shape))
    if spec.nbytes != found["bytes"] or math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(file, "bytes = product of shape and item size", repr(found), _DAMAGED, path)
    return spec


def _parse_file(name: str, found: object, file) -> FileSpec:
    _object(found, {"bytes": int, "sha256": str}, f"file {name!r}", file)
    sound = all(map(is_plain_name, name.split("/"))) and re.fullmatch("[0-9a-f]{64}", found["sha256"])
    if not sound or found["bytes"] < 0:
        raise CheckpointError(file, "a relative path, a size and a digest", f"{name!r}: {found!r}", _DAMAGED)
    return FileSpec(found["bytes"], found["sha256"])
