"""Triton kernels; imported only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def bmma_gemv(
    w_ptr,  # uint32 [N / 16, KT, P, 32, 4], `bmma.pack_weight`
    x_ptr,  # uint32 [M, KT, 32, 2], `bmma.pack_activations`
    sums_ptr,  # int32 [M, KT * HALVES], CENTRE times the sums of x over every part
    scale_ptr,  # float32 [N, GROUPS]
    y_ptr,  # float32 [M, N]
    N: tl.constexpr,
    KT: tl.constexpr,  # tiles of 256 columns
    P: tl.constexpr,  # weight planes
    GROUPS: tl.constexpr,
    HALVES: tl.constexpr,  # parts of a tile with a scale of their own: 2 for groups of 128
    PARTS: tl.constexpr,  # parts that share a scale
):
    """Sixteen outputs of one activation row per warp: a 16-byte load per lane and a binary product per plane and tile."""
    tile, m = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, 128)
    lane, register = i // 4, i % 4
    g, t = lane // 4, lane % 4
    row, column = g + 8 * (register // 2), 2 * t + register % 2
    weight = tl.where(column == 7, -128, 1 << column)
    total = tl.zeros((128,), tl.float32)
    for k in range(KT):
        x = tl.load(x_ptr + (m * KT + k) * 64 + lane * 2 + register % 2)
        for h in tl.static_range(HALVES):
            count = tl.zeros((128,), tl.int32)
            part = x if HALVES == 1 else tl.where(register % 2 == h, x, 0)
            for p in tl.static_range(P):
                w = tl.load(w_ptr + ((tile * KT + k) * P + p) * 128 + i)
                count += (
                    tl.inline_asm_elementwise(
                        """{ .reg .b32 z; mov.b32 z, 0;
                        mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
                        {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }""",
                        "=r,=r,=r,=r,r,r,r,r,r,r,r,r",
                        [w, part],
                        dtype=tl.int32,
                        is_pure=True,
                        pack=4,
                    )
                    << p
                )
            sums = tl.load(sums_ptr + (m * KT + k) * HALVES + h)
            centred = count * weight - tl.where(column == 0, sums, 0)
            scale = tl.load(scale_ptr + (tile * 16 + row) * GROUPS + (k * HALVES + h) // PARTS)
            total += scale * centred.to(tl.float32)
    y = tl.sum(tl.sum(tl.reshape(total, (8, 4, 2, 2)), 3), 1)  # [g, row_hi]
    rows = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
    tl.store(y_ptr + m * N + tile * 16 + rows, y)
