"""Speed in paired, interleaved runs, greedy decoding of compressed models, and the memory of compiled programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.core.apply import compressed
from jaxcomp.evaluate.intervals import Interval, median_by_order
from jaxcomp.models.llama import init_cache


class Paired(NamedTuple):
    """Times of several functions, run in turns on one machine.

    Attributes:
      seconds: {name: float64 [rounds]}, wall time of each call.
      load: mean number of busy processes of the whole machine before and after (one-minute average).
      cores: CPU cores of the machine; times are disturbed where `load` comes near it.
    """

    seconds: Mapping[str, Float[np.ndarray, "rounds"]]
    load: tuple[float, float]
    cores: int

    def speedup(self, name: str, base: str) -> Interval:
        """Median over rounds of time(base) / time(name), with a 95 % interval of the median (order statistics)."""
        return median_by_order(self.seconds[base] / self.seconds[name])


def paired(functions: Mapping[str, Callable[[], Any]], rounds: int = 9, rest: float = 0.0) -> Paired:
    """Times functions of no arguments in turns, in an order that reverses each round; one call of each comes first untimed.

    Args:
      functions: what to time; a call ends when all arrays that it returns are there.
      rounds: timed calls of each.
      rest: seconds before every timed call. Threads of a library spin for some milliseconds after its work; where functions
        belong to several libraries, a call would otherwise share the cores with threads of the one before.

    Raises:
      ValueError: rounds < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for function in functions.values():
        jax.block_until_ready(function())
    before, seconds = os.getloadavg()[0], {name: np.empty(rounds) for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            time.sleep(rest)
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name][i] = time.perf_counter() - start
    return Paired(seconds, (before, os.getloadavg()[0]), os.cpu_count() or 1)


class Memory(NamedTuple):
    """Bytes that XLA assigns to a compiled program on one device: its arguments, results, and scratch at the peak."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All three together."""
        return sum(self)


def program_memory(program: jax.stages.Compiled) -> Memory:
    """Memory of a compiled program, `jax.jit(fn).lower(...).compile()`."""
    stats = program.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes)


class Decoder(NamedTuple):
    """A greedy decoder compiled for one tree of params.

    Attributes:
      run: `run() -> int32 [B, steps]`, the generated tokens.
      tokens: tokens that a run generates, over all sequences.
      memory: what XLA assigns to the program of one step.
    """

    run: Callable[[], Int[Array, "B steps"]]
    tokens: int
    memory: Memory


def decoder(model: Any, params: Any, prompt: Int[Array, "B T"], steps: int) -> Decoder:
    """Compiles greedy decoding of a `Llama` after a prompt; params may hold compressed leaves.

    One program per step, its cache donated, as servers run it; a loop on the device would let XLA move work out of the loop.
    """
    variables, prompt = {"params": params}, jnp.asarray(prompt, jnp.int32)
    apply = compressed(model.apply)
    empty = init_cache(model.config, prompt.shape[0], prompt.shape[1] + steps - 1, model.dtype)

    def step(variables, tokens, cache):
        logits, cache = apply(variables, tokens, cache, last_only=True)
        return jnp.argmax(logits, -1).astype(jnp.int32), cache

    prefill = jax.jit(step).lower(variables, prompt, empty).compile()
    first = prefill(variables, prompt, empty)
    advance = jax.jit(step, donate_argnums=2).lower(variables, *first).compile()

    def run():
        token, cache = prefill(variables, prompt, empty)
        out = [token]
        for _ in range(steps - 1):
            token, cache = advance(variables, token, cache)
            out.append(token)
        return jnp.concatenate(out, 1)

    return Decoder(run, steps * prompt.shape[0], program_memory(advance))
