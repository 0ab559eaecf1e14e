"""Outlier channels, injected without changing the function of a decoder."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.llama import stack_layers, unstack_layers
from jaxcomp.models.llama_config import LlamaConfig

_READERS = {"attn_norm": ("attn", ("q", "k", "v")), "mlp_norm": ("mlp", ("gate", "up"))}


def inject_outliers(
    config: LlamaConfig, params: dict[str, Any], key: jax.Array, *, channels: int = 2, factor: float = 20.0
) -> dict[str, Any]:
    """Gives every block the activation outliers of a large model; the function of the decoder stays the same.

    In each block the gains of `channels` random channels of the norms before attention and MLP are multiplied by
    `factor`, and the rows of q, k, v / gate, up that read them are divided by it. Bit-exact for a power of two, to
    rounding otherwise and for Gemma, which stores gain - 1. Takes dense params of either layout of `Llama`.

    Raises:
      ValueError: `channels` is not in [0, hidden_size] or `factor` is not positive and finite.
    """
    if not 0 <= channels <= config.hidden_size:
        raise ValueError(f"channels must be in [0, {config.hidden_size}], found {channels}")
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor must be positive and finite, found {factor}")
    if "blocks" in params:
        flat = unstack_layers(params)
        return stack_layers(inject_outliers(config, flat, key, channels=channels, factor=factor))
    names = [f"blocks_{i}" for i in range(config.num_layers)]
    keys = jax.random.split(key, (len(names), len(_READERS)))
    blocks = dict(params)
    for name, block_keys in zip(names, keys, strict=True):
        for norm, norm_key in zip(_READERS, block_keys, strict=True):
            gain = _gain(norm_key, config.hidden_size, channels, factor)
            blocks[name] = _scale_norm(blocks[name], norm, gain, config.traits.gemma)
    return blocks


def _gain(key: jax.Array, size: int, channels: int, factor: float) -> Float[Array, "D"]:
    """1 everywhere but `factor` on random channels."""
    chosen = jax.random.choice(key, size, (channels,), replace=False)
    return jnp.ones(size, jnp.float32).at[chosen].set(factor)


def _scale_norm(block: dict[str, Any], norm: str, gain: Float[Array, "D"], unit_offset: bool) -> dict[str, Any]:
    """Block with the gain of a norm multiplied by `gain` and the rows of its readers divided by it."""
    scale = block[norm]["scale"]
    wide = scale.astype(jnp.float32)
    scaled = (wide + 1.0) * gain - 1.0 if unit_offset else wide * gain
    scaled = jnp.where(gain == 1.0, scale, scaled.astype(scale.dtype))
    module, readers = _READERS[norm]
    divided = {name: _divide_rows(block[module][name], gain) for name in readers}
    return block | {norm: {"scale": scaled}, module: block[module] | divided}


def _divide_rows(dense: dict[str, Any], gain: Float[Array, "D"]) -> dict[str, Any]:
    kernel = dense["kernel"]
    return dense | {"kernel": (kernel.astype(jnp.float32) / gain[:, None]).astype(kernel.dtype)}
