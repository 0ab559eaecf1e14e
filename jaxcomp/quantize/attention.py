"""Attention on quantized queries, keys and values, and attention probabilities as an output of a decoder block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.core.apply import compressed
from jaxcomp.formats import ActivationQuantizer, Grid
from jaxcomp.models import Block, Context, LlamaConfig, dot_product_attention
from jaxcomp.models.llama import Layer
from jaxcomp.quantize.lwc import balanced


def quantized_attention(
    bits: int, *, balance: bool = False, attention_fn: Callable[..., Array] = dot_product_attention
) -> Callable[..., Array]:
    """An `attention_fn` for queries, keys and values rounded per token and head, asymmetric, straight-through.

    That is the key-value cache at `bits` bits in effect, not in memory: values are rounded, the cache stays in floating point.
    """
    grid = Grid(bits, symmetric=False)
    quantizer = ActivationQuantizer(balanced(grid) if balance else grid)

    def attend(query, key, value, **options):
        return attention_fn(*map(quantizer.fake, (query, key, value)), **options)

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
    """Runs one decoder block, compressed leaves or not: `(block, x [B, T, D], layer) -> (y, attention map or None)`. Hashable.

    Attributes:
      config: the model's.
      kv_bits: bits of queries, keys and values; 16 keeps them in floating point.
      balance: bit balance of theirs.
      with_map: also return the attention map.
    """

    config: LlamaConfig
    kv_bits: int = 16
    balance: bool = False
    with_map: bool = False

    def __call__(self, block: Any, x: Float[Array, "B T D"], layer: Layer) -> tuple[Array, Array | None]:
        """Output of the block on sequences that start at position 0."""
        context = Context(jnp.arange(x.shape[1], dtype=jnp.int32)[None], jnp.zeros((), jnp.int32))

        def run(block, x):
            seen = []

            def attend(query, key, value, mask, **options):
                if self.with_map:
                    seen.append(attention_map(query, key, mask, **options))
                return dot_product_attention(query, key, value, mask=mask, **options)

            attention_fn = attend
            if self.kv_bits < 16:
                attention_fn = quantized_attention(self.kv_bits, balance=self.balance, attention_fn=attend)
            y, _ = Block(self.config, attention_fn).apply({"params": block}, x, None, layer, context)
            return (y, *seen)

        y, *seen = compressed(run)(block, x)
        return y, seen[0] if seen else None
