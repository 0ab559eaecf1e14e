"""Diffusion transformers in plain Flax Linen: DiT (adaLN-zero) and the single-stream video transformer of Wan.

`embed`, `trunk` and `head` are the three parts that a sampler calls one by one; `trunk` shows every module that a cache may
replace to `around(name, fn, x)`, where `fn` is a pure function, so that `around` may put it under `lax.cond`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.attention import dot_product_attention
from jaxcomp.models.dit_config import DiTConfig
from jaxcomp.models.llama import RMSNorm
from jaxcomp.models.patches import patchify, unpatchify
from jaxcomp.models.positions import rotate_pairs, timestep_features

_INIT = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros
Around = Callable[[str, Callable[[Array], Array], Array], Array]


class Condition(NamedTuple):
    """What all blocks see beside the tokens; a token axis of size 1 is shared by all tokens.

    Attributes:
      vector: embedding of time plus class, [B, 1|L, D].
      modulation: shifts, scales and gates before the table of each block, [B, 1|L, 6, D]; None for "linear".
      text: keys of cross-attention, [B, S, D], or None.
      angles: rotary angles, [1, L, head_dim/2], or None.
    """

    vector: Float[Array, "B #L D"]
    modulation: Float[Array, "B #L 6 D"] | None
    text: Float[Array, "B S D"] | None
    angles: Float[Array, "1 L d"] | None


def direct(name: str, fn: Callable[[Array], Array], x: Array) -> Array:
    """The `around` that changes nothing: fn(x)."""
    del name
    return fn(x)


def pure(module: nn.Module) -> Callable[..., Array]:
    """A bound module as a pure function, so that it may run inside any JAX transformation."""
    if module.is_initializing():
        return module
    bare, variables = module.unbind()
    return lambda *args: bare.apply(variables, *args)


def modulate(x: Float[Array, "B L D"], shift: Float[Array, "B #L D"], scale: Float[Array, "B #L D"]) -> Array:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class MLP(nn.Module):
    """down(act(up(x)))."""

    hidden: int
    features: int
    activation: Callable[[Array], Array] = nn.gelu  # tanh form
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B D"]:
        """Applies the layer to every row."""
        up = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=_INIT, name="up")(x)
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=_INIT, name="down")(self.activation(up))


class Attention(nn.Module):
    """Attention of x to itself, or to `source`; angles turn queries and keys."""

    config: DiTConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        source: Float[Array, "B S D"] | None = None,
        angles: Float[Array, "#B L d"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One output per row of x."""
        c = self.config
        source = x if source is None else source
        dense = lambda name: nn.Dense(c.hidden_size, dtype=self.dtype, kernel_init=_INIT, name=name)
        query, key, value = dense("q")(x), dense("k")(source), dense("v")(source)
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, name="q_norm")(query)
            key = RMSNorm(c.norm_eps, name="k_norm")(key)
        query, key, value = (y.reshape(*y.shape[:2], c.num_heads, -1) for y in (query, key, value))
        if angles is not None:
            query, key = rotate_pairs(query, angles), rotate_pairs(key, angles)
        out = self.attention_fn(query, key, value)
        return dense("o")(out.reshape(x.shape))


class Modulation(nn.Module):
    """`count` shifts, scales or gates per token: a map of silu(condition) that starts at zero, or a table added to it."""

    count: int
    table: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, condition: Array) -> list[Float[Array, "B #L D"]]:
        """From [B, #L, D]; a table from [B, #L, count|1, D]."""
        size = condition.shape[-1]
        if self.table:
            init = nn.initializers.normal(size**-0.5)
            parts = self.param("table", init, (1, 1, self.count, size)).astype(self.dtype) + condition
        else:
            flat = nn.Dense(self.count * size, dtype=self.dtype, kernel_init=_ZEROS, name="linear")(nn.silu(condition))
            parts = flat.reshape(*flat.shape[:-1], self.count, size)
        return [parts[..., i, :] for i in range(self.count)]


class Block(nn.Module):
    """Self-attention, cross-attention where there is text, and MLP, each on a normed and modulated stream, the result gated.

    adaLN-zero: Peebles & Xie, ICCV 2023, arXiv 2212.09748, section 3.2.
    """

    config: DiTConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        self.modulation = Modulation(6, c.modulation == "table", self.dtype)
        self.attn = Attention(c, self.attention_fn, self.dtype)
        self.mlp = MLP(c.mlp_size, c.hidden_size, dtype=self.dtype)
        norm = lambda eps: nn.LayerNorm(eps, dtype=self.dtype, use_bias=False, use_scale=False)
        self.norm, self.mlp_norm = norm(c.norm_eps), norm(c.mlp_norm_eps or c.norm_eps)
        if c.text_size:
            self.cross_norm = nn.LayerNorm(c.norm_eps, dtype=self.dtype)
            self.cross = Attention(c, self.attention_fn, self.dtype)

    def __call__(self, h: Float[Array, "B L D"], c: Condition, around: Around = direct) -> Float[Array, "B L D"]:
        """Stream after this block; `around` sees "attn", "cross" and "mlp" before their gates."""
        condition = c.vector if c.modulation is None else c.modulation
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition)
        attn, mlp = pure(self.attn), pure(self.mlp)
        x = modulate(self.norm(h), shift_attn, scale_attn)
        h = h + gate_attn * around("attn", lambda x: attn(x, None, c.angles), x)
        if self.config.text_size:
            cross = pure(self.cross)
            h = h + around("cross", lambda x: cross(x, c.text), self.cross_norm(h))
        return h + gate_mlp * around("mlp", mlp, modulate(self.mlp_norm(h), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """Diffusion transformer over images, latents or videos; see `DiTConfig`.

    `attention_fn(query[B,L,H,d], key, value)` divides scores by sqrt(d), as Flax's own. `dtype` is that of activations.
    """

    config: DiTConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the submodules."""
        c = self.config
        dense = lambda features, init=_INIT: nn.Dense(features, dtype=self.dtype, kernel_init=init)
        self.patch = dense(c.hidden_size)
        self.time = MLP(c.hidden_size, c.hidden_size, nn.silu, self.dtype)
        if c.num_classes:
            self.label = nn.Embed(
                c.num_classes + 1, c.hidden_size, self.dtype, embedding_init=nn.initializers.normal(0.02)
            )
        if c.text_size:
            self.text = MLP(c.hidden_size, c.hidden_size, dtype=self.dtype)
        table = c.modulation == "table"
        if table:
            self.time_modulation = dense(6 * c.hidden_size)
        self.blocks = [Block(c, self.attention_fn, self.dtype) for _ in range(c.num_layers)]
        self.head_norm = nn.LayerNorm(c.norm_eps, dtype=self.dtype, use_bias=False, use_scale=False)
        self.head_modulation = Modulation(2, table, self.dtype)
        self.out = dense(math.prod(c.patch) * (c.out_channels or c.channels), _ZEROS)

    def __call__(self, x: Array, t: Array, cond: Array | None = None, around: Around = direct) -> Array:
        """Prediction for x: `head` of `trunk` of `embed`."""
        h, c = self.embed(x, t, cond)
        return self.head(self.trunk(h, c, around), c)

    def embed(
        self, x: Float[Array, "B *size C"], t: Float[Array, "B"] | Float[Array, "B L"], cond: Array | None = None
    ) -> tuple[Float[Array, "B L D"], Condition]:
        """Tokens and the condition of the blocks.

        Args:
          x: noisy inputs.
          t: diffusion time on a scale of 1000, one per sample or one per token.
          cond: int32 [B] classes, or float [B, S, text_size]; None is "no class" (and no text for a model without).

        Raises:
          ValueError: shapes that the config does not have, or text is missing.
        """
        config = self.config
        self._check(x, t, cond)
        h = self.patch(patchify(x.astype(self.dtype), config.patch))
        table = jnp.asarray(config.positions(), jnp.float32)[None]
        angles = table if config.position == "rope" else None
        h = h if angles is not None else h + table.astype(self.dtype)
        t = t[:, None] if t.ndim == 1 else t
        vector = self.time(timestep_features(t, config.frequency_size, config.frequency_shift).astype(self.dtype))
        if config.num_classes:
            label = jnp.full(x.shape[:1], config.num_classes, jnp.int32) if cond is None else cond
            vector = vector + self.label(label)[:, None]
        text = self.text(cond.astype(self.dtype)) if config.text_size else None
        return h, Condition(vector, self._shared_modulation(vector), text, angles)

    def trunk(self, h: Float[Array, "B L D"], c: Condition, around: Around = direct) -> Float[Array, "B L D"]:
        """All blocks; `around` sees "blocks_0", "blocks_0/attn", "blocks_0/mlp", ..."""
        for i, block in enumerate(self.blocks):
            inner = lambda name, fn, x, i=i: around(f"blocks_{i}/{name}", fn, x)
            run = pure(block)
            h = around(f"blocks_{i}", lambda h, run=run, inner=inner: run(h, c, inner), h)
        return h

    def head(self, h: Float[Array, "B L D"], c: Condition, variance: bool = False) -> Float[Array, "B *size C"]:
        """Prediction, shaped as the input; with `variance` the learned variances follow in further channels."""
        config = self.config
        table = config.modulation == "table"
        shift, scale = self.head_modulation(c.vector[..., None, :] if table else c.vector)
        out = unpatchify(self.out(modulate(self.head_norm(h), shift, scale)), config.grid, config.patch)
        return out if variance else out[..., : config.channels]

    def _shared_modulation(self, vector: Array) -> Array | None:
        if self.config.modulation != "table":
            return None
        flat = self.time_modulation(nn.silu(vector))
        return flat.reshape(*vector.shape[:-1], 6, -1)

    def _check(self, x: Array, t: Array, cond: Array | None) -> None:
        c, batch = self.config, x.shape[0]
        if x.shape[1:] != (*c.size, c.channels):
            raise ValueError(f"x: expected [batch, {', '.join(map(str, (*c.size, c.channels)))}], found {x.shape}")
        if t.shape not in ((batch,), (batch, c.num_tokens)):
            raise ValueError(f"t: expected [{batch}] or [{batch}, {c.num_tokens}], found {t.shape}")
        if c.text_size and (cond is None or cond.ndim != 3 or cond.shape[::2] != (batch, c.text_size)):
            found = None if cond is None else cond.shape
            raise ValueError(f"cond: expected text [{batch}, tokens, {c.text_size}], found {found}; encode the prompt")
        if cond is not None and not c.text_size and (not c.num_classes or cond.shape != (batch,)):
            expected = f"classes [{batch}]" if c.num_classes else "None for an unconditional model"
            raise ValueError(f"cond: expected {expected}, found {cond.shape}")


def init_params(config: DiTConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh params of a `DiT`, float32."""
    x = jnp.zeros((1, *config.size, config.channels))
    cond = jnp.zeros((1, 1, config.text_size)) if config.text_size else None
    return jax.jit(DiT(config).init)(key, x, jnp.zeros((1,)), cond)["params"]
