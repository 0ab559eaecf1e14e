"""The weight layouts that back ends read, each an exact bijection with unsigned codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, UInt8

from pallas_kernels.arbitrary_bit_matmul import five_levels, packing
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


LAYOUTS = {
    "dense": Layout(
        lambda codes, s: packing.pack_dense(codes, s.bits), lambda w, s: packing.unpack_dense(w, s.bits, s.k)
    ),
    "base5": Layout(lambda codes, s: five_levels.pack_base5(codes), lambda w, s: five_levels.unpack_base5(w, s.k)),
}


def unpack(weight: Prepared, spec: WeightSpec) -> UInt8[Array, "n k"]:
    """Unsigned codes of a weight in any layout."""
    return LAYOUTS[weight.layout].unpack(weight.data, spec)


def convert(weight: Prepared, layouts: tuple[str, ...], spec: WeightSpec) -> Prepared:
    """The weight in the first of these layouts, through its codes; as it is where it has one of them."""
    if weight.layout in layouts:
        return weight
    return Prepared(LAYOUTS[layouts[0]].pack(unpack(weight, spec), spec), layouts[0])
