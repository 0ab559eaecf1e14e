"""Triton kernels; imported only where Triton is installed. Scores are in units of log2."""

import triton
import triton.language as tl

MASKED = tl.constexpr(-2.3e38)


@triton.jit
def merge(top, norm, acc, scores, v):
    """(maximum, normaliser, sums) after more keys: scores [R, w], v [w, D]."""
    high = tl.maximum(top, tl.max(scores, 1))
    alpha = tl.exp2(top - high)
    p = tl.exp2(scores - high[:, None])
    return high, alpha * norm + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@triton.jit
def window(
    q_ptr,  # [Hq, NP, D]
    k_ptr,  # [Hk, T, D]
    v_ptr,
    start_ptr,  # int32 [1]
    top_ptr,  # float32 [Hq, NP]
    norm_ptr,
    acc_ptr,  # float32 [Hq, NP, D]
    scale,  # of the scores, times log2(e)
    N,  # rows that are no padding
    NP,
    T,
    GROUP,  # query heads per key head
    SEGMENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """First pass: a tile of rows and the keys of its own segment."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, column = tile * BM + tl.arange(0, BM), tl.arange(0, D)
    first = tile * BM // SEGMENT * SEGMENT
    end = tl.minimum((tile + 1) * BM if CAUSAL else first + SEGMENT, N)
    flat = head.to(tl.int64) * NP + row
    q = tl.load(q_ptr + flat[:, None] * D + column[None, :])
    own = (head // GROUP).to(tl.int64) * T + tl.load(start_ptr)
    top, norm = tl.full((BM,), MASKED, tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for j in tl.range(first, end, BN, num_stages=2):
        key = j + tl.arange(0, BN)
        at, inside = own + key, key < end
        k = tl.load(k_ptr + at[None, :] * D + column[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(v_ptr + at[:, None] * D + column[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = inside[None, :] & (key[None, :] <= row[:, None]) if CAUSAL else inside[None, :] & (row[:, None] >= 0)
        top, norm, acc = merge(top, norm, acc, tl.where(seen, scores, MASKED), v)
    tl.store(top_ptr + flat, top)
    tl.store(norm_ptr + flat, norm)
    tl.store(acc_ptr + flat[:, None] * D + column[None, :], acc)


@triton.jit
def visit(
    q_ptr,
    k_ptr,
    v_ptr,
    order_ptr,  # int32 [H, M, L], L a multiple of CH * BN
    count_ptr,  # int32 [H, M]
    threshold_ptr,  # float32 [H]
    rows_ptr,  # int32 [H, M, TILES, R], rows of the flat q
    top_in,  # of the first pass
    norm_in,
    acc_in,
    top_ptr,  # float32 [Hq, NP]
    norm_ptr,
    acc_ptr,  # float32 [Hq, NP, D]
    blocks_ptr,  # int32 [H, M, TILES]
    gain_ptr,  # float32 [H, M, TILES]
    scale,
    N,
    NP,
    T,
    L,
    M,
    SHARE,  # lists per key head
    TILES: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    CH: tl.constexpr,  # blocks between two looks
    MIN: tl.constexpr,
    D: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BUDGET: tl.constexpr,
):
    """Second pass: a tile and its list. Rows are taken and put back by number; the inner range is pipelined, a while is not."""
    segment, tile = M - 1 - tl.program_id(0) // TILES, tl.program_id(0) % TILES  # long histories first
    list_ = tl.program_id(1)
    place = list_ * M + segment
    row = tl.load(rows_ptr + (place * TILES + tile) * R + tl.arange(0, R))
    column = tl.arange(0, D)
    valid = (row % NP < N).to(tl.float32)
    flat = row.to(tl.int64)[:, None] * D + column[None, :]
    q, acc = tl.load(q_ptr + flat), tl.load(acc_in + flat)
    top, norm = tl.load(top_in + row), tl.load(norm_in + row)
    count, threshold = tl.load(count_ptr + place), tl.load(threshold_ptr + list_)
    total = tl.where(tl.max(valid, 0) > 0, (count + BN - 1) // BN, 0)
    base = (list_ // SHARE).to(tl.int64) * T
    listed = order_ptr + place.to(tl.int64) * L
    visited, gain = 0, 0.0
    on = total > 0
    while on:
        top0, norm0 = top, norm
        for c in tl.range(0, CH, num_stages=2):
            at = (visited + c) * BN + tl.arange(0, BN)
            key = base + tl.load(listed + at, mask=at < L, other=0)
            k = tl.load(k_ptr + key[None, :] * D + column[:, None])
            v = tl.load(v_ptr + key[:, None] * D + column[None, :])
            scores = tl.dot(q, k, input_precision="ieee") * scale
            scores = tl.where((at < count)[None, :] & (row[:, None] >= 0), scores, MASKED)
            top, norm, acc = merge(top, norm, acc, scores, v)
        added = tl.maximum(norm - norm0 * tl.exp2(top0 - top), 0.0)
        if AGGREGATE == "max":
            gain = tl.max(valid * (added / norm), 0) / CH
        elif AGGREGATE == "mean":
            gain = tl.sum(valid * (added / norm), 0) / tl.maximum(tl.sum(valid, 0), 1.0) / CH
        else:
            gain = tl.sum(valid * added, 0) / tl.maximum(tl.sum(valid * norm, 0), 1.0) / CH
        visited = tl.minimum(visited + CH, total)
        left = gain * (total - visited).to(tl.float32)
        score = left / (1.0 + left) if BUDGET else gain
        on = (visited < total) & ((visited < MIN) | (score >= threshold))
    tl.store(blocks_ptr + place * TILES + tile, visited)
    tl.store(gain_ptr + place * TILES + tile, gain)
    tl.store(top_ptr + row, top)
    tl.store(norm_ptr + row, norm)
    tl.store(acc_ptr + flat, acc)
