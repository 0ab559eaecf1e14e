"""The weight layouts that back ends read, each an exact bijection with unsigned codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, UInt8

from pallas_kernels.arbitrary_bit_matmul import packing
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec


class Layout(NamedTuple):
    """Ways from unsigned codes uint8 [N, K] to stored arrays and back."""

    pack: Callable[[UInt8[Array, "n k"], WeightSpec], Any]
    unpack: Callable[[Any, WeightSpec], UInt8[Array, "n k"]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data",), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A weight in the layout of a back end: a pytree, the layout's name is static."""

    data: Any
    layout: str


def _pack_dense(codes, spec):
    return packing.pack_dense(codes, spec.bits)


def _unpack_dense(words, spec):
    return packing.unpack_dense(words, spec.bits, spec.k)


LAYOUTS = {
    "dense": Layout(_pack_dense, _unpack_dense),
}


def unpack(packed: jax.Array | Prepared, spec: WeightSpec) -> UInt8[Array, "n k"]:
    """Unsigned codes of dense words or of a prepared weight."""
    if isinstance(packed, Prepared):
        return LAYOUTS[packed.layout].unpack(packed.data, spec)
    return _unpack_dense(packed, spec)


def convert(packed: jax.Array | Prepared, layout: str, spec: WeightSpec) -> Any:
    """The stored arrays of another layout, through the codes; nothing is done where the layout is already there."""
    present = packed.layout if isinstance(packed, Prepared) else "dense"
    if present == layout:
        return packed.data if isinstance(packed, Prepared) else packed
    return LAYOUTS[layout].pack(unpack(packed, spec), spec)
