"""Operands of the binary tensor-core instruction `mma.m16n8k256 .b1 and.popc` of NVIDIA GPUs, Ampere to Hopper.

The eight bit planes of one int8 activation row are the eight columns of its second operand; a bit plane of 16 rows of W is the
first, so that weights are never unpacked. Column a of the result counts with 2^a, a = 7 with -128 (two's complement), and weight
plane p with 2^p: the binary decomposition of ABQ-LLM (arXiv 2408.08554) for one row, whose planes fill what would be padding.

A warp of 32 lanes holds the fragments; lane = 4 g + t. In words of 32 columns, with word = 4 k_hi + t of the eight of a tile:
  first operand, 4 registers     register row_hi + 2 k_hi: row g + 8 row_hi
  second operand, 2 registers    register k_hi: column g
  result, 4 registers            register c: row g + 8 (c // 2), column 2 t + c % 2
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, UInt8, UInt32

from pallas_kernels.arbitrary_bit_matmul import packing

TILE_ROWS, TILE_COLUMNS = 16, 256


def pack_weight(codes: UInt8[Array, "n k"], bits: int) -> UInt32[Array, "n_tiles k_tiles b 32 4"]:
    """Fragments of unsigned codes: N in tiles of 16, K in tiles of 256, filled with zeros."""
    n, k = codes.shape
    planes = packing.pack_planes(jnp.pad(codes, ((0, -n % TILE_ROWS), (0, -k % TILE_COLUMNS))), bits)
    tiles = planes.reshape(bits, -1, 2, 8, planes.shape[-1] // 8, 2, 4)  # b, N tile, row_hi, g, K tile, k_hi, t
    return tiles.transpose(1, 4, 0, 3, 6, 5, 2).reshape(tiles.shape[1], tiles.shape[4], bits, 32, 4)


def unpack_weight(fragments: UInt32[Array, "n_tiles k_tiles b 32 4"], n: int, k: int) -> UInt8[Array, "n k"]:
    """Codes of `pack_weight`."""
    rows, columns, bits = fragments.shape[:3]
    tiles = fragments.reshape(rows, columns, bits, 8, 4, 2, 2).transpose(2, 0, 6, 3, 1, 5, 4)
    planes = tiles.reshape(bits, rows * TILE_ROWS, columns * 8)
    return packing.unpack_planes(planes, columns * TILE_COLUMNS)[:n, :k]


def pack_activations(x: Int8[Array, "m k"]) -> UInt32[Array, "m k_tiles 32 2"]:
    """Fragments of every row: its eight two's complement planes, K in tiles of 256, filled with zeros."""
    codes = lax.bitcast_convert_type(packing.pad_last(x, TILE_COLUMNS), jnp.uint8)
    planes = packing.pack_planes(codes, 8)  # plane, M, word
    tiles = planes.reshape(8, x.shape[0], -1, 2, 4)
    return tiles.transpose(1, 2, 0, 4, 3).reshape(x.shape[0], -1, 32, 2)
