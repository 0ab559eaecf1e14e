"""The weight layouts that back ends read, each an exact bijection with unsigned codes.

dense       uint32 [N, ceil(K b / 32)], canonical, see `packing`
bytes       uint8 [N, 4 ceil(K b / 32)], the same bytes: XLA on CPU reads them in half the time that it takes to split words
base5       uint32 [N, ceil(ceil(K / 3) 7 / 32)], see `five_levels`
kn_int4     int4 [K', N'], u - centre, for b <= 4; K' and N' are padded to whole TPU blocks
kn_int8     int8 [K', N'], u - centre
kn_planes   int32 [b, K' / 32, N']: in every TPU block of B columns of W, bit j of word r is column r + j B / 32, so that a block
            is expanded by shifts and concatenation, without a shuffle
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt8

from pallas_kernels.arbitrary_bit_matmul import bmma, five_levels, packing
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec

TPU_COLUMNS = 256  # columns of W in a TPU block are a multiple: 8 sublanes of 32 bits
TPU_ROWS = 128  # rows of W likewise: the lanes

GPU_TILE = 128  # rows and columns of a tile of W on GPU


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


def tpu_block(spec: WeightSpec) -> int:
    """Columns of W in a TPU block: whole groups, and a multiple of `TPU_COLUMNS`."""
    return 2 * TPU_COLUMNS if spec.groups == 1 else math.lcm(spec.group_size, TPU_COLUMNS)


def _integers_nk(dtype) -> Layout:
    def pack(codes, spec):
        return _pad((codes.astype(jnp.int32) - spec.centre).astype(dtype), (GPU_TILE, GPU_TILE))

    return Layout(pack, lambda data, spec: (data[: spec.n, : spec.k].astype(jnp.int32) + spec.centre).astype(jnp.uint8))


def _integers_kn(dtype) -> Layout:
    def pack(codes, spec):
        return _pad((codes.astype(jnp.int32) - spec.centre).astype(dtype).T, (tpu_block(spec), TPU_ROWS))

    return Layout(
        pack, lambda data, spec: (data[: spec.k, : spec.n].T.astype(jnp.int32) + spec.centre).astype(jnp.uint8)
    )


def _pack_kn_planes(codes: UInt8[Array, "n k"], spec: WeightSpec) -> Int32[Array, "b words n"]:
    block = tpu_block(spec)
    bits = packing.code_bits(_pad(codes.T, (block, TPU_ROWS)), spec.bits).astype(jnp.uint32)
    bits = bits.reshape(-1, 32, block // 32, *bits.shape[1:])
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape(1, 32, 1, 1, 1)
    words = (bits << shifts).sum(1, dtype=jnp.uint32)  # [blocks, B / 32, N', b]
    return lax.bitcast_convert_type(jnp.moveaxis(words.reshape(-1, *words.shape[2:]), -1, 0), jnp.int32)


def _unpack_kn_planes(planes: Int32[Array, "b words n"], spec: WeightSpec) -> UInt8[Array, "n k"]:
    words = lax.bitcast_convert_type(planes, jnp.uint32).reshape(
        spec.bits, -1, 1, tpu_block(spec) // 32, planes.shape[-1]
    )
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32, 1, 1)
    bits = ((words >> shifts) & 1).astype(jnp.uint8).reshape(spec.bits, -1, planes.shape[-1])
    return packing.bits_to_codes(jnp.moveaxis(bits, 0, -1))[: spec.k, : spec.n].T


def _pad(a: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
    return jnp.pad(a, [(0, -size % multiple) for size, multiple in zip(a.shape, multiples, strict=True)])


LAYOUTS = {
    "dense": Layout(
        lambda codes, s: packing.pack_dense(codes, s.bits), lambda w, s: packing.unpack_dense(w, s.bits, s.k)
    ),
    "bytes": Layout(
        lambda codes, s: packing.words_to_bytes(packing.pack_dense(codes, s.bits)),
        lambda data, s: packing.unpack_dense(packing.bytes_to_words(data), s.bits, s.k),
    ),
    "base5": Layout(lambda codes, s: five_levels.pack_base5(codes), lambda w, s: five_levels.unpack_base5(w, s.k)),
    "bmma": Layout(lambda codes, s: bmma.pack_weight(codes, s.bits), lambda w, s: bmma.unpack_weight(w, s.n, s.k)),
    "nk_int4": _integers_nk(jnp.int4),
    "nk_int8": _integers_nk(jnp.int8),
    "kn_int4": _integers_kn(jnp.int4),
    "kn_int8": _integers_kn(jnp.int8),
    "kn_planes": Layout(_pack_kn_planes, _unpack_kn_planes),
}


BY_ROWS = ("dense", "bytes", "base5")  # row n of the codes is row n of the stored array


def unpack(weight: Prepared, spec: WeightSpec) -> UInt8[Array, "n k"]:
    """Unsigned codes of a weight in any layout."""
    return LAYOUTS[weight.layout].unpack(weight.data, spec)


def convert(weight: Prepared, layouts: tuple[str, ...], spec: WeightSpec) -> Prepared:
    """The weight in the first of these layouts, through its codes; as it is where it has one of them."""
    if weight.layout in layouts:
        return weight
    return Prepared(LAYOUTS[layouts[0]].pack(unpack(weight, spec), spec), layouts[0])
