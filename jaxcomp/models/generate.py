"""Autoregressive sampling with a key-value cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomp.models.llama import Llama, init_cache


def generate(
    model: Llama,
    params: Any,
    prompt: Int[Array, "B T"],
    steps: int,
    key: Array | None = None,
    temperature: float = 0.0,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    apply: Callable[..., Any] | None = None,
) -> Int[Array, "B steps"]:
    """Continues `prompt` by `steps` tokens in one compiled loop: greedy at temperature 0, sampled above.

    `segment_ids`: 1 for text and 0 for padding on the left. `apply`: default `model.apply`. Under `jit`,
    `model`, `steps`, `temperature` and `apply` are static.

    Raises:
      ValueError: steps < 1, a negative temperature, or a positive one without `key`.
    """
    if steps < 1 or temperature < 0:
        raise ValueError(f"generate needs steps >= 1 and temperature >= 0, found {steps} and {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature {temperature} samples at random; pass key=jax.random.key(seed)")
    apply = model.apply if apply is None else apply
    cache = init_cache(model.config, prompt.shape[0], prompt.shape[1] + steps - 1, model.dtype)
    variables = {"params": params}
    logits, cache = apply(variables, prompt, cache, segment_ids=segment_ids, last_only=True)
    keys = jax.random.split(jax.random.key(0) if key is None else key, steps)
    first = _sample(logits[:, -1], keys[0], temperature)

    def step(carry, key):
        token, cache = carry
        logits, cache = apply(variables, token[:, None], cache)
        token = _sample(logits[:, -1], key, temperature)
        return (token, cache), token

    rest = jax.lax.scan(step, (first, cache), keys[1:])[1]
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _sample(logits: Float[Array, "B V"], key: Array, temperature: float) -> Int[Array, "B"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
