"""Llama-family decoder in plain Flax Linen: Llama 2/3, Mistral, Qwen 2/3, Gemma 2/3 (text)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.models.attention import Context, KVCache, dot_product_attention, visible
from jaxcomp.models.llama_config import LlamaConfig
from jaxcomp.models.rope import inverse_frequencies, rotate

_INIT = nn.initializers.normal(0.02)
_GLOBAL_WINDOW = np.iinfo(np.int32).max
KeyValue = tuple[Float[Array, "L B S K d"], Float[Array, "L B S K d"]]


class Layer(NamedTuple):
    """What differs between layers besides weights; stacked over layers for `scan_layers`."""

    index: Int[Array, ""]
    window: Int[Array, ""]
    inv_freq: Float[Array, "d/2"]
    amplitude: Float[Array, ""]


def layer_table(config: LlamaConfig) -> Layer:
    """The `Layer` of every layer as numpy arrays with a leading axis L."""
    ropes = [config.rope if window is None else config.local_rope or config.rope for window in config.windows]
    return Layer(
        index=np.arange(config.num_layers, dtype=np.int32),
        window=np.array([window or _GLOBAL_WINDOW for window in config.windows], np.int32),
        inv_freq=np.stack([inverse_frequencies(rope, config.head_dim) for rope in ropes]),
        amplitude=np.array([rope.amplitude for rope in ropes], np.float32),
    )


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """Empty cache for `max_len` tokens; `dtype` is that of keys and values."""
    shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
    return KVCache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        segments=jnp.zeros((batch, max_len), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale in float32 (Zhang & Sennrich, 2019, arXiv 1910.07467); `unit_offset`: 1 + scale."""

    eps: float
    unit_offset: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalised x, in x.dtype."""
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = scale + 1.0 if self.unit_offset else scale
        return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embedding."""

    config: LlamaConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        qkv_bias = c.attention_bias or c.traits.qkv_bias
        self.q = self._dense(c.num_heads * c.head_dim, qkv_bias)
        self.k = self._dense(c.num_kv_heads * c.head_dim, qkv_bias)
        self.v = self._dense(c.num_kv_heads * c.head_dim, qkv_bias)
        self.o = self._dense(c.hidden_size, c.attention_bias)
        if c.traits.qk_norm:
            self.q_norm = RMSNorm(c.norm_eps, c.traits.gemma, self.param_dtype)
            self.k_norm = RMSNorm(c.norm_eps, c.traits.gemma, self.param_dtype)

    def _dense(self, features: int, use_bias: bool) -> nn.Dense:
        return nn.Dense(features, use_bias, self.dtype, self.param_dtype, kernel_init=_INIT)

    def __call__(
        self, x: Float[Array, "B T D"], kv: KeyValue | None, layer: Layer, context: Context
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Attends to x, or to the cached keys and values after writing those of x."""
        c = self.config
        query, key, value = (module(x).reshape(*x.shape[:2], -1, c.head_dim) for module in (self.q, self.k, self.v))
        if c.traits.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, context.positions, layer.inv_freq, layer.amplitude)
        key = rotate(key, context.positions, layer.inv_freq, layer.amplitude)
        if kv is not None:
            kv = tuple(_write(old, new, layer.index, context.start) for old, new in zip(kv, (key, value), strict=True))
            key, value = (_read(old, layer.index).astype(self.dtype) for old in kv)
        if c.query_pre_attn_scalar is not None:  # attention_fn divides by sqrt(head_dim)
            query = query * jnp.asarray((c.head_dim / c.query_pre_attn_scalar) ** 0.5, query.dtype)
        options = {} if c.attn_softcap is None else {"softcap": c.attn_softcap}
        mask = visible(context, layer.window, key.shape[1])
        out = self.attention_fn(query, key, value, mask=mask, **options)
        return self.o(out.reshape(*x.shape[:2], -1)), kv


def _write(old: Float[Array, "L B S K d"], new: Float[Array, "B T K d"], layer: Array, start: Array) -> Array:
    zero = jnp.zeros_like(start)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (layer, zero, start, zero, zero))


def _read(old: Float[Array, "L B S K d"], layer: Array) -> Float[Array, "B S K d"]:
    return jax.lax.dynamic_index_in_dim(old, layer, keepdims=False)


class MLP(nn.Module):
    """Gated feed-forward layer down(act(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202)."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        dense = lambda features: nn.Dense(features, c.mlp_bias, self.dtype, self.param_dtype, kernel_init=_INIT)
        self.gate, self.up, self.down = dense(c.intermediate_size), dense(c.intermediate_size), dense(c.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every token."""
        act = nn.silu if self.config.traits.activation == "silu" else nn.gelu  # nn.gelu: tanh form
        return self.down(act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One decoder layer: pre-norm attention and MLP, each added to the residual stream."""

    config: LlamaConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        names = ["attn_norm", "mlp_norm"] + (["post_attn_norm", "post_mlp_norm"] if c.traits.gemma else [])
        for name in names:
            setattr(self, name, RMSNorm(c.norm_eps, c.traits.gemma, self.param_dtype))
        self.attn = Attention(c, self.attention_fn, self.dtype, self.param_dtype)
        self.mlp = MLP(c, self.dtype, self.param_dtype)

    def __call__(
        self, x: Float[Array, "B T D"], kv: KeyValue | None, layer: Layer, context: Context
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Residual stream after this layer, and the cache with this layer's keys and values written."""
        gemma = self.config.traits.gemma
        branch, kv = self.attn(self.attn_norm(x), kv, layer, context)
        x = x + (self.post_attn_norm(branch) if gemma else branch)
        branch = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(branch) if gemma else branch), kv


class Llama(nn.Module):
    """Decoder-only language model; see `LlamaConfig` for the families.

    `attention_fn(query[B,T,H,d], key[B,S,K,d], value, mask=bool[B|1,1,T,S])` divides scores by sqrt(d), as
    Flax's own does, and gets `softcap` too when the config has one. `scan_layers`: one "blocks" subtree with
    a leading layer axis, compiled once. `remat`: recompute each block in the backward pass. `dtype` is that
    of activations, `param_dtype` that of new parameters.
    """

    config: LlamaConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, self.dtype, self.param_dtype, embedding_init=_INIT)
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        new_block = lambda: block(c, self.attention_fn, self.dtype, self.param_dtype)
        self.blocks = new_block() if self.scan_layers else [new_block() for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps, c.traits.gemma, self.param_dtype)
        if not c.tie_embeddings:
            self.head = nn.Dense(
                c.vocab_size, False, self.dtype, self.param_dtype, kernel_init=_INIT, dot_general=_wide_dot
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        last_only: bool = False,
    ) -> Float[Array, "B _ V"] | tuple[Float[Array, "B _ V"], KVCache]:
        """Next-token logits, float32; with a cache the tokens continue it and (logits, cache) is returned.

        `segment_ids`: tokens see only their own segment (packed documents, or a 0/1 padding mask), default 1.
        `positions`: of the rotary embedding, default slots. `last_only`: logits of the last token, [B, 1, V].

        Raises:
          ValueError: more tokens than the cache has slots.
        """
        context, cache = _context(tokens, cache, segment_ids, positions)
        kv = None if cache is None else (cache.key, cache.value)
        x, kv = self._run_blocks(self.embed_tokens(tokens), kv, context)
        logits = self.logits(x[:, -1:] if last_only else x)
        return logits if cache is None else (logits, cache._replace(key=kv[0], value=kv[1]))

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Input of the first block."""
        x = self.embed(tokens)
        gemma = self.config.traits.gemma
        return x * jnp.asarray(self.config.hidden_size**0.5, self.dtype) if gemma else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits from the output of the last block, float32."""
        x = self.final_norm(x)
        if self.config.tie_embeddings:  # `Embed.attend`, but with sums and logits in float32
            table = self.embed.embedding.astype(self.dtype)
            logits = _wide_dot(x, table, (((2,), (1,)), ((), ())))
        else:
            logits = self.head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _run_blocks(self, x: Array, kv: KeyValue | None, context: Context) -> tuple[Array, KeyValue | None]:
        table = layer_table(self.config)
        if not self.scan_layers:
            for i, block in enumerate(self.blocks):
                x, kv = block(x, kv, jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), table), context)
            return x, kv
        scan = nn.scan(
            lambda block, carry, layer: (block(*carry, layer, context), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
        )
        return scan(self.blocks, (x, kv), jax.tree.map(jnp.asarray, table))[0]


def _wide_dot(*args, **kwargs) -> Array:
    return jax.lax.dot_general(*args, **kwargs | {"preferred_element_type": jnp.float32})


def _context(tokens, cache, segment_ids, positions) -> tuple[Context, KVCache | None]:
    """Slots, positions and segments of this call, and the cache advanced by its tokens."""
    length = tokens.shape[1]
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length
    positions = start + jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
    if cache is None:
        return Context(positions, start, segment_ids, segment_ids), None
    if length > cache.segments.shape[1]:
        raise ValueError(
            f"{length} tokens do not fit a cache of {cache.segments.shape[1]}; enlarge init_cache's max_len"
        )
    segments = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    cache = cache.append_segments(segments)
    return Context(positions, start, segments, cache.segments), cache


def stack_layers(params: dict) -> dict:
    """Joins "blocks_0", "blocks_1", ... into "blocks" with a leading layer axis, as `scan_layers` wants.

    Raises:
      ValueError: the blocks differ in structure.
    """
    blocks = [params[f"blocks_{i}"] for i in range(sum(name.startswith("blocks_") for name in params))]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params: dict) -> dict:
    """Inverse of `stack_layers`."""
    num_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "blocks"}
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], params["blocks"])
    return rest | {f"blocks_{i}": pick(i) for i in range(num_layers)}
