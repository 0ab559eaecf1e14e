"""Both passes as Pallas TPU kernels: keys and values stay in HBM, and every listed row arrives by a copy of its own.

A grid step owns a segment of a list: a gathered block serves all of its tiles and all heads of the group before the next one is
waited for; tiles that have stopped are skipped, and the loop ends with the last of them. Keys and values are interleaved as
[T, 2, d]: one copy moves both, and a row starts at a tile of memory whatever its dtype, which a row of [T, d] does not.
Compiled ahead of time and interpreted only: no figure of its speed is claimed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.rows import own_rows, put_rows, take_rows, valid_rows
from pallas_kernels.sparse_attention.spec import MASKED, Backend, Inputs, Outputs, Spec, State

LANES = 128
VMEM_BYTES = 12 << 20  # of a segment's rows, which the kernel holds at once; the smallest generation has 16 MiB


def attend(x: Inputs, spec: Spec, *, interpret: Any = False) -> Outputs:
    """See `spec.Backend`; `interpret` is that of `pl.pallas_call`."""
    acc, norms = _window(x, spec, interpret)
    tiles = [take_rows(a, x.rows) for a in (x.q, acc, norms)]
    inside = valid_rows(x.rows, spec).astype(jnp.float32)[..., None]
    acc, norms, blocks, gain = _visit(tiles[0], tiles[1], jnp.concatenate([tiles[2], inside], -1), x, spec, interpret)
    acc, norms = (put_rows(a, x.rows, x.q) for a in (acc, norms))
    shape = x.rows.shape[:3]
    return Outputs(State(norms[..., 0], norms[..., 1], acc), blocks.reshape(shape), gain.reshape(shape))


def refuse(spec: Spec, x: Inputs) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    d, share = x.q.shape[-1], x.q.shape[0] // x.order.shape[0]
    if x.q.dtype not in (jnp.float32, jnp.bfloat16) or x.k.dtype != x.q.dtype or x.v.dtype != x.q.dtype:
        return f"q, k, v of {x.q.dtype}, {x.k.dtype}, {x.v.dtype}; it takes one of float32 and bfloat16"
    if d % LANES:
        return f"heads of {d} dimensions; it takes multiples of {LANES}"
    if spec.block_q % 16 or spec.stride % LANES:
        return f"block_q={spec.block_q}, {spec.stride} keys between looks; it takes multiples of 16 and {LANES}"
    held = (
        2 * spec.segment * share * (d * (8 + x.q.dtype.itemsize) + 8 * LANES)
    )  # q, sums in and out, norms, twice each
    if held > VMEM_BYTES:
        return f"{spec.segment} rows x {share} heads take {held >> 20} MiB of VMEM; use shorter segments or lists per query head"
    return None


BACKEND = Backend("tpu", refuse, attend)


def _window(x: Inputs, spec: Spec, interpret) -> tuple[jax.Array, jax.Array]:
    """First pass: sums [Hq, padded, d], and (maximum, normaliser) [Hq, padded, 2]."""
    heads, rows, d = x.q.shape
    group, block = heads // x.k.shape[0], spec.block_q
    k, v = (own_rows(a, x.start, spec, a.dtype).reshape(a.shape[0], rows, d) for a in (x.k, x.v))
    key = lambda h, m, i, j: (lax.div(h, group), m * spec.tiles + (jnp.minimum(i, j) if spec.causal else j), 0)
    here = lambda h, m, i, j: (h, m * spec.tiles + i, 0)
    return pl.pallas_call(
        functools.partial(_window_body, spec=spec, scale=d**-0.5),
        out_shape=[jax.ShapeDtypeStruct((heads, rows, n), jnp.float32) for n in (d, 2)],
        grid=(heads, spec.segments, spec.tiles, spec.tiles),
        in_specs=[pl.BlockSpec((1, block, d), index) for index in (here, key, key)],
        out_specs=[pl.BlockSpec((1, block, n), here) for n in (d, 2)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(x.q, k, v)


def _window_body(q, k, v, acc, norms, *, spec: Spec, scale: float):
    m, i, j = (pl.program_id(axis) for axis in (1, 2, 3))

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        norms[0, :, 0:1] = jnp.full((spec.block_q, 1), MASKED)
        norms[0, :, 1:2] = jnp.zeros((spec.block_q, 1))

    @pl.when(j <= (i if spec.causal else spec.tiles))
    def _():
        scores = _dot(q[0], k[0], (1, 1)) * scale
        row, key = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        row, key = row + i * spec.block_q, key + j * spec.block_q
        seen = key <= row if spec.causal else key + m * spec.segment < spec.length
        scores = jnp.where(seen, scores, MASKED)
        top, norm, _, new = _merge(norms[0, :, 0:1], norms[0, :, 1:2], acc[0], scores, v[0])
        acc[0], norms[0, :, 0:1], norms[0, :, 1:2] = new, top, norm


def _visit(q, acc, norms, x: Inputs, spec: Spec, interpret):
    """Second pass over tiles [H, M, tiles, R, *]: sums, (maximum, normaliser), and blocks and gain [H M, 1, tiles]."""
    lists, segments, tiles, rows, d = q.shape
    kv = jnp.stack([x.k, x.v], 2)
    order = x.order.reshape(lists * segments, -1, 1, spec.stride)
    here = lambda *shape: pl.BlockSpec((1, 1, tiles, rows, *shape), lambda h, m, *_: (h, m, 0, 0, 0))
    flat = pl.BlockSpec((1, 1, tiles), lambda h, m, *_: (h * segments + m, 0, 0), memory_space=pltpu.SMEM)
    body = functools.partial(_visit_body, spec=spec, share=lists // x.k.shape[0], scale=d**-0.5)
    return pl.pallas_call(
        body,
        out_shape=[
            *(jax.ShapeDtypeStruct((*q.shape[:4], n), jnp.float32) for n in (d, 2)),
            *(jax.ShapeDtypeStruct((lists * segments, 1, tiles), t) for t in (jnp.int32, jnp.float32)),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(lists, segments),
            in_specs=[here(d), here(d), here(3), *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
            out_specs=[here(d), here(2), flat, flat],
            scratch_shapes=[
                pltpu.SMEM((2, 1, spec.stride), jnp.int32),
                pltpu.VMEM((2, spec.stride, 2, d), x.k.dtype),
                pltpu.SMEM((tiles,), jnp.int32),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(x.count.reshape(-1), x.threshold, q, acc, norms, order, kv)


def _visit_body(count, threshold, q, acc0, norms0, order, kv, acc, norms, blocks, gain, *scratch, spec, share, scale):
    index, buffer, active, listed, arrived = scratch
    list_, segment = pl.program_id(0), pl.program_id(1)
    place = list_ * spec.segments + segment
    total = lax.div(count[place] + (spec.block_k - 1), spec.block_k)  # `//` asks for the TPU at hand
    looks = lax.div(total + (spec.check_every - 1), spec.check_every)
    source = kv.at[lax.div(list_, share)]

    def fetch(look, slot):
        pltpu.make_async_copy(order.at[place, look], index.at[slot], listed).start()
        pltpu.make_async_copy(order.at[place, look], index.at[slot], listed).wait()

        def row(j, _):
            pltpu.make_async_copy(source.at[index[slot, 0, j]], buffer.at[slot, j], arrived.at[slot]).start()
            return 0

        lax.fori_loop(0, spec.stride, row, 0)

    def wait(slot):
        pltpu.make_async_copy(source.at[pl.ds(0, spec.stride)], buffer.at[slot], arrived.at[slot]).wait()

    def tile(t, look, slot):
        """One look of a tile; whether it goes on."""
        state = norms[0, 0, t]
        at = look * spec.stride + lax.broadcasted_iota(jnp.int32, (1, spec.stride), 1)
        scores = jnp.where(at < count[place], _dot(q[0, 0, t], buffer[slot, :, 0, :], (1, 1)) * scale, MASKED)
        top, norm, added, new = _merge(state[:, 0:1], state[:, 1:2], acc[0, 0, t], scores, buffer[slot, :, 1, :])
        acc[0, 0, t], norms[0, 0, t] = new, jnp.concatenate([top, norm], 1)
        visited = jnp.minimum((look + 1) * spec.check_every, total)
        share = _gain(added, norm, norms0[0, 0, t, :, 2:3], spec)
        blocks[0, 0, t], gain[0, 0, t] = visited, share
        left = share * (total - visited).astype(jnp.float32)
        score = left / (1.0 + left) if spec.stop == "budget" else share
        on = (visited < total) & ((visited < spec.min_blocks) | (score >= threshold[list_]))
        active[t] = on.astype(jnp.int32)
        return active[t]

    def look(carry):
        step, _ = carry
        slot = lax.rem(step, 2)

        @pl.when(step + 1 < looks)
        def _():
            fetch(step + 1, 1 - slot)

        wait(slot)
        one = lambda t, running: running + lax.cond(active[t] == 1, lambda: tile(t, step, slot), lambda: 0)
        return step + 1, lax.fori_loop(0, spec.tiles, one, 0)

    acc[...] = acc0[...]
    norms[...] = norms0[..., 0:2]
    for t in range(spec.tiles):
        blocks[0, 0, t], gain[0, 0, t] = jnp.int32(0), jnp.float32(0)
        active[t] = (jnp.max(norms0[0, 0, t, :, 2:3]) > 0).astype(jnp.int32)

    @pl.when(looks > 0)
    def _():
        fetch(0, 0)

    steps, _ = lax.while_loop(lambda c: (c[0] < looks) & (c[1] > 0), look, (jnp.int32(0), jnp.int32(1)))

    @pl.when(steps < looks)  # the block that was fetched for nothing
    def _():
        wait(lax.rem(steps, 2))


def _merge(top, norm, acc, scores, values):
    """(maximum, normaliser, what it gained, sums) after more keys; columns [R, 1]."""
    high = jnp.maximum(top, jnp.max(scores, 1, keepdims=True))
    alpha, p = jnp.exp(top - high), jnp.exp(scores - high)
    added = jnp.sum(p, 1, keepdims=True)
    return high, alpha * norm + added, added, alpha * acc + _dot(p.astype(values.dtype), values, (1, 0))


def _gain(added, norm, valid, spec: Spec):
    """Gain per block over the rows of a tile, columns [R, 1]."""
    if spec.aggregate == "max":
        gain = jnp.max(valid * (added / norm))
    elif spec.aggregate == "mean":
        gain = jnp.sum(valid * (added / norm)) / jnp.maximum(jnp.sum(valid), 1.0)
    else:
        gain = jnp.sum(valid * added) / jnp.maximum(jnp.sum(valid * norm), 1.0)
    return gain / spec.check_every


def _dot(a, b, axes):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
