"""Both passes on CPU in C++, and the sort of the ranking: optional, built once per source and machine by the system's compiler.

    python -c "from pallas_kernels.sparse_attention import cpu_ffi; print(cpu_ffi.build())"

`implementation="cpu_ffi"` builds on first use; `implementation=None` uses it where it has been built. Segments run on the threads
of XLA's pool, the longest history first.
"""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from pallas_kernels import native
from pallas_kernels.sparse_attention.spec import Backend, Inputs, Outputs, Spec, State

_TARGET = "pallas_kernels_sparse_attention"
_ORDER = f"{_TARGET}_order"
_HANDLERS = ((_TARGET, "SparseAttention"), (_ORDER, "SparseAttentionOrder"))
LIBRARY = native.Library(pathlib.Path(__file__).with_name("cpu_ffi.cc"), _HANDLERS)
is_built, build = LIBRARY.is_built, LIBRARY.build
_AGGREGATES = ("mean", "max", "ratio")


def attend(x: Inputs, spec: Spec) -> Outputs:
    """See `spec.Backend`; float32 throughout, whatever the dtype of q, k, v."""
    LIBRARY.register()
    rows = x.q.shape[:2]
    shapes = [(*rows,), (*rows,), x.q.shape, x.rows.shape[:3], x.rows.shape[:3]]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    results = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, dtypes, strict=True)]
    call = jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")
    wide = (a.astype(jnp.float32) for a in (x.q, x.k, x.v))
    top, norm, acc, blocks, gain = call(
        *wide,
        x.order,
        x.count,
        x.threshold,
        x.rows,
        x.start.reshape(1),
        length=spec.length,
        segment=spec.segment,
        block_k=spec.block_k,
        check_every=spec.check_every,
        min_blocks=spec.min_blocks,
        aggregate=_AGGREGATES.index(spec.aggregate),
        budget=spec.stop == "budget",
        causal=spec.causal,
    )
    return Outputs(State(top * math.log(2), norm, acc), blocks, gain)


def packed_order(words: UInt32[Array, "*b t"], bits: int) -> Int[Array, "*b t"]:
    """The low `bits`, which hold the position, of the words of every row in rising order."""
    LIBRARY.register()
    result = jax.ShapeDtypeStruct(words.shape, jnp.int32)
    return jax.ffi.ffi_call(_ORDER, result, vmap_method="broadcast_all")(words, bits=bits)


def refuse(spec: Spec, x: Inputs) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    if x.q.shape[-1] % 4:
        return f"heads of {x.q.shape[-1]} dimensions; it takes multiples of 4"
    return LIBRARY.refuse()


BACKEND = Backend("cpu_ffi", refuse, attend)
