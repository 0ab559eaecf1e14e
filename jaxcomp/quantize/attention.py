"""Attention on quantized queries, keys and values, and attention probabilities as an output of a decoder block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.formats import Grid
from jaxcomp.models import Block, Context, LlamaConfig, dot_product_attention
from jaxcomp.models.llama import Layer
from jaxcomp.quantize.straight_through import balanced, fake


def quantized_attention(
    bits: int, *, balance: bool = False, attention_fn: Callable[..., Array] = dot_product_attention
) -> Callable[..., Array]:
    """An `attention_fn` for queries, keys and values rounded per token and head, asymmetric, straight-through.

    That is the key-value cache at `bits` bits in effect, not in memory: values are rounded, the cache stays in floating point.
    From 16 bits on it is `attention_fn` itself.
    """
    if bits >= 16:
        return attention_fn
    grid = Grid(bits, symmetric=False)
    grid = balanced(grid) if balance else grid

    def attend(query, key, value, **options):
        return attention_fn(*(fake(x, grid) for x in (query, key, value)), **options)

    return attend


def attention_map(
    query: Float[Array, "B T H d"], key: Float[Array, "B S K d"], mask: Bool[Array, "..."], softcap: float | None = None
) -> Float[Array, "B T S"]:
    """Attention probabilities averaged over heads, float32; scores as in `dot_product_attention`."""
    batch, length, _, depth = query.shape
    grouped = (query * jnp.asarray(depth**-0.5, query.dtype)).reshape(batch, length, key.shape[2], -1, depth)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1).mean((1, 2))


@dataclasses.dataclass(frozen=True)
class BlockRunner:
    """Runs one dense decoder block: `(block, x [B, T, D], layer) -> (y, attention map or None)`. Hashable.

    Attributes:
      config: the model's.
      inputs: (path of a Dense below the block, grid) of every layer whose inputs are rounded per token.
      kv_bits: bits of queries, keys and values; 16 keeps them in floating point.
      balance: bit balance of theirs.
      with_map: also return the attention map.
    """

    config: LlamaConfig
    inputs: tuple[tuple[str, Grid], ...] = ()
    kv_bits: int = 16
    balance: bool = False
    with_map: bool = False

    def __call__(self, block: Any, x: Float[Array, "B T D"], layer: Layer) -> tuple[Array, Array | None]:
        """Output of the block on sequences that start at position 0."""
        maps = []

        def attend(query, key, value, mask, **options):
            if self.with_map:
                maps.append(attention_map(query, key, mask, **options))
            return dot_product_attention(query, key, value, mask=mask, **options)

        rounded = quantized_attention(self.kv_bits, balance=self.balance, attention_fn=attend)
        module = Block(self.config, rounded)
        context = Context(jnp.arange(x.shape[1], dtype=jnp.int32)[None], jnp.zeros((), jnp.int32))
        with nn.intercept_methods(self._round_inputs):
            y, _ = module.apply({"params": block}, x, None, layer, context)
        return y, maps[0] if maps else None

    def _round_inputs(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        grid = dict(self.inputs).get("/".join(context.module.path))
        return call(*args, **kwargs) if grid is None else call(fake(args[0], grid), *args[1:], **kwargs)
