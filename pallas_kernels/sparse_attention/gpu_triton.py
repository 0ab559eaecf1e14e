"""Both passes on NVIDIA GPUs through Triton: rows of keys and values are loaded by index, 2 d bytes or more at a time.

Needs `jax_triton` and a GPU. Compiled and interpreted only: no figure of its speed is claimed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.spec import Backend, Inputs, Outputs, Spec, State

MAX_ROWS = 256  # of a tile: its sums live in registers


def attend(x: Inputs, spec: Spec) -> Outputs:
    """See `spec.Backend`."""
    import jax_triton

    from pallas_kernels.sparse_attention import triton_kernels

    rows, shape = x.q.shape[:2], x.rows.shape[:3]
    state = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (rows, rows, x.q.shape)]
    counts = [jax.ShapeDtypeStruct(shape, t) for t in (jnp.int32, jnp.float32)]
    call = lambda kernel, arrays, out, grid, meta: jax_triton.triton_call(
        *arrays, kernel=kernel, out_shape=out, grid=grid, num_warps=8, **meta
    )
    first, second = constants(x, spec)
    grid = spec.padded // spec.block_q, rows[0]
    window = call(triton_kernels.window, (x.q, x.k, x.v, x.start.reshape(1)), state, grid, first)
    arrays = x.q, x.k, x.v, x.order, x.count, x.threshold, x.rows, *window
    grid = shape[1] * shape[2], shape[0]
    top, norm, acc, blocks, gain = call(triton_kernels.visit, arrays, [*state, *counts], grid, second)
    return Outputs(State(top * math.log(2), norm, acc), blocks, gain)


def refuse(spec: Spec, x: Inputs) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    rows, d = x.rows.shape[-1], x.q.shape[-1]
    sizes = {"rows of a tile": rows, "block_q": spec.block_q, "block_k": spec.block_k, "head dimensions": d}
    for what, size in sizes.items():
        if size < 16 or size & (size - 1):
            return f"{size} {what}; it takes powers of two from 16 on"
    if rows > MAX_ROWS or d > 256:
        return f"tiles of {rows} rows of {d} dimensions; it takes up to {MAX_ROWS} and 256"
    if x.q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or not x.q.dtype == x.k.dtype == x.v.dtype:
        return f"q, k, v of {x.q.dtype}, {x.k.dtype}, {x.v.dtype}; it takes one of float32, bfloat16 and float16"
    if jax.default_backend() != "gpu":
        return "no GPU: jax_triton compiles for the device at hand"
    return _import_error()


BACKEND = Backend("triton", refuse, attend)


def constants(x: Inputs, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scalars and compile-time constants of `triton_kernels.window` and `triton_kernels.visit`, behind their arrays."""
    (heads, padded, d), (key_heads, keys, _) = x.q.shape, x.k.shape
    common = {"scale": math.log2(math.e) * d**-0.5, "N": spec.length, "NP": padded, "T": keys}
    shape = {"BN": spec.block_k, "D": d}
    window = {"GROUP": heads // key_heads, "SEGMENT": spec.segment, "BM": spec.block_q, "CAUSAL": spec.causal}
    lists, segments, tiles, rows = x.rows.shape
    visit = {"L": x.order.shape[-1], "M": segments, "SHARE": lists // key_heads, "TILES": tiles, "R": rows}
    stop = {
        "CH": spec.check_every,
        "MIN": spec.min_blocks,
        "AGGREGATE": spec.aggregate,
        "BUDGET": spec.stop == "budget",
    }
    return common | window | shape, common | visit | shape | stop


def _import_error() -> str | None:
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"jax_triton cannot be imported ({error}); install the extra 'gpu'"
    return None
