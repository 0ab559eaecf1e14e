"""Dense causal attention, what sparse attention is compared with: chunked in XLA, and whatever the platform's libraries have."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.sparse_attention.spec import MASKED, State, empty, merge


def chunked_attention(
    q: Float[Array, "hq n d"], k: Float[Array, "hk n d"], v: Float[Array, "hk n d"], block: int = 512
) -> Float[Array, "hq n d"]:
    """Exact causal attention with an online softmax in tiles of block x block; tiles above the diagonal are skipped.

    Raises:
      ValueError: `block` does not divide N.
    """
    heads, n, d = q.shape
    if n % block:
        raise ValueError(f"block={block} must divide N={n}")
    group = heads // k.shape[0]
    inside = jnp.arange(block)[None, :] <= jnp.arange(block)[:, None]
    part = lambda a, i: lax.dynamic_slice_in_dim(a, i * block, block).astype(jnp.float32)

    def tile(at):
        h, i = at // (n // block), at % (n // block)
        rows, keys, values = part(q[h], i) * d**-0.5, k[h // group], v[h // group]
        below = lambda j, state: merge(state, rows @ part(keys, j).T, part(values, j))
        state: State = lax.fori_loop(0, i, below, empty(rows))
        state = merge(state, jnp.where(inside, rows @ part(keys, i).T, MASKED), part(values, i))
        return (state.acc / state.norm[:, None]).astype(q.dtype)

    return lax.map(tile, jnp.arange(heads * (n // block), dtype=jnp.int32)).reshape(q.shape)


def peers(q: np.ndarray, k: np.ndarray, v: np.ndarray, largest: int) -> dict[str, Callable[[], object]]:
    """Name -> a call that computes dense causal attention of float32 arrays [H, N, d] on this platform, and waits for it.

    XLA's own materialises N x N scores: it is left out beyond `largest` bytes of them. PyTorch's, on CPU, where it is installed.
    """
    arrays = jax.tree.map(jnp.asarray, (q, k, v))
    gpu = jax.default_backend() == "gpu"
    blocks = [block for block in (256, 1024) if q.shape[1] % block == 0]
    calls = {f"chunked/{block}": _call(functools.partial(chunked_attention, block=block), arrays) for block in blocks}
    if q.shape[0] * q.shape[1] ** 2 * 4 <= largest:
        calls["jax.nn"] = _call(_library("xla"), arrays)
    if gpu:
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arrays)
        calls["cudnn"] = _call(_library("cudnn"), half)
    elif (call := _torch(q, k, v)) is not None:
        calls["torch"] = call
    return calls


def _call(f, arrays):
    f = jax.jit(f)
    return lambda: jax.block_until_ready(f(*arrays))


def _library(implementation):
    def attend(*arrays):
        batch = (jnp.swapaxes(a, 0, 1)[None] for a in arrays)
        return jax.nn.dot_product_attention(*batch, is_causal=True, implementation=implementation)

    return attend


def _torch(q, k, v):
    try:
        import torch
    except ImportError:
        return None
    q, k, v = (torch.from_numpy(np.array(a))[None] for a in (q, k, v))
    grouped = {"is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **grouped)
