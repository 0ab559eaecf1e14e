"""Compressed leaves: what every one of them is, and how trees that hold them are walked.

A compressed leaf is an immutable pytree that stands where an array stood: it knows the logical shape and dtype, holds only
the packed arrays, and can `materialise()` itself. Which kernel meets which primitive is said in `jaxcomp.formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
import quax

from jaxcomp.core import tape

_KINDS: dict[str, type] = {}


class Parts(eqx.Module):
    """A pytree node that can be taken apart into named arrays and JSON-able statics, and put together again."""

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            if cls.kind in _KINDS and _KINDS[cls.kind].__qualname__ != cls.__qualname__:
                raise TypeError(f"leaf kind {cls.kind!r} is taken by {_KINDS[cls.kind]}; choose another name")
            _KINDS[cls.kind] = cls

    def components(self) -> dict[str, jax.Array]:
        """Named arrays, nested nodes joined by `.`; absent (None) fields are left out."""
        out = {}
        for field in _dynamic_fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, Parts):
                out |= {f"{field.name}.{k}": v for k, v in value.components().items()}
            elif value is not None:
                out[field.name] = value
        return out

    def statics(self) -> dict[str, Any]:
        """JSON-able static fields; nested nodes appear as `{"kind": ..., **statics}`."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("static")}
        for field in _dynamic_fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, Parts):
                out[field.name] = {"kind": value.kind, **value.statics()}
        return out

    @classmethod
    def from_parts(cls, components: Mapping[str, Any], statics: Mapping[str, Any]) -> Parts:
        """The inverse of `components` and `statics`; the class checks its own invariants.

        Raises:
          ValueError: a field is unknown or missing, or the parts contradict each other.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        names = {name.split(".")[0] for name in components} | set(statics)
        if unknown := sorted(names - set(fields)):
            raise ValueError(f"{cls.kind}: unknown fields {unknown}; known are {sorted(fields)}")
        values = {}
        for name, field in fields.items():
            if isinstance(statics.get(name), Mapping):
                nested = dict(statics[name])
                below = {k.partition(".")[2]: v for k, v in components.items() if k.startswith(name + ".")}
                values[name] = leaf_class(nested.pop("kind", "")).from_parts(below, nested)
            elif field.metadata.get("static"):
                if name not in statics and field.default is dataclasses.MISSING:
                    raise ValueError(f"{cls.kind}: static field {name!r} is missing")
                values[name] = _tuples(statics.get(name, field.default))
            else:
                values[name] = components.get(name)
        return cls(**values)


class CompressedArray(Parts, quax.ArrayValue):
    """Base of all compressed leaves.

    Every leaf type ends with the static field `name`: empty in stored trees, the path while `explain` and `calibrate` trace.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the leaf holds, metadata (scales, zero points) included."""
        return sum(component_nbytes(v) for v in self.components().values())

    @staticmethod
    def default(primitive, values, params):
        """No rule for this primitive: materialise every compressed operand, and say so on the tape."""
        arrays = [materialise(v, primitive.name) if is_compressed(v) else v for v in values]
        return primitive.bind(*arrays, **params)


def leaf_class(kind: str) -> type:
    """The registered class of a leaf kind. Raises ValueError with the known kinds otherwise."""
    if kind not in _KINDS:
        raise ValueError(f"unknown leaf kind {kind!r}; known are {sorted(_KINDS)}")
    return _KINDS[kind]


def leaf_kinds() -> dict[str, type]:
    """All registered leaf kinds by name."""
    return {k: c for k, c in _KINDS.items() if issubclass(c, CompressedArray)}


def is_compressed(x: Any) -> bool:
    """True for a compressed leaf."""
    return isinstance(x, CompressedArray)


def materialise(leaf: Any, primitive: str = "materialise") -> jax.Array:
    """The dense array of a leaf (arrays pass through), with a tape event that names the primitive which forced it."""
    if not is_compressed(leaf):
        return leaf
    tape.event(leaf.name, primitive, tape.MATERIALISED, leaf.shape)
    return materialise(type(leaf).materialise(leaf), primitive)


def materialise_tree(params: Any) -> Any:
    """The dense tree of a compressed tree."""
    return map_leaves(lambda _, leaf: materialise(leaf), params)


def component_nbytes(x: Any) -> int:
    """Bytes of an array or abstract array."""
    return int(np.prod(x.shape, dtype=np.int64)) * jax.numpy.dtype(x.dtype).itemsize


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, compressed or not."""
    return sum(component_nbytes(x) for x in jax.tree.leaves(tree))


def path_str(path: tuple) -> str:
    """A jax key path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(params: Any) -> dict[str, Any]:
    """`{path: leaf}` in tree order; a compressed leaf is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    return {path_str(path): leaf for path, leaf in flat}


def map_leaves(fn: Callable[[str, Any], Any], params: Any) -> Any:
    """Maps `fn(path, leaf)` over a tree whose leaves may be compressed."""
    return jax.tree_util.tree_map_with_path(lambda p, x: fn(path_str(p), x), params, is_leaf=is_compressed)


def replace_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """A tree with the leaves at the given paths replaced.

    Raises:
      KeyError: a path is not in the tree.
    """
    if missing := sorted(set(new) - set(leaves_with_paths(params))):
        raise KeyError(f"no leaf at {missing[:3]}; the tree has {sorted(leaves_with_paths(params))[:8]} ...")
    return map_leaves(lambda path, leaf: new.get(path, leaf), params)


def named(params: Any) -> Any:
    """The same tree with every compressed leaf carrying its path as `name`, for `explain` and `calibrate`."""
    return map_leaves(lambda p, x: dataclasses.replace(x, name=p) if is_compressed(x) else x, params)


def _dynamic_fields(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if not f.metadata.get("static")]


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x
