"""Paired timing, decoding step by step, memory of programs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import compress
from jaxcomp.evaluate.throughput import Paired, decoder, paired, program_memory
from jaxcomp.models import Llama, LlamaConfig, generate
from jaxcomp.quantize import rtn

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, tie_embeddings=True
)


def test_speedup_is_the_median_of_paired_ratios():
    drift = np.array([1.0, 2, 3, 4, 50])  # the machine slows down, for both alike
    times = Paired({"old": 2 * drift, "new": drift * [1, 1, 1, 0.5, 4]}, (0.1, 0.2), 2)
    assert times.speedup("new", "old") == (2.0, 0.5, 4.0)
    assert times.speedup("old", "old") == (1.0, 1.0, 1.0)


def test_interval_of_the_median_covers_it():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        ratios = np.exp(rng.normal(size=25))
        _, low, high = Paired({"base": ratios, "new": np.ones(25)}, (0.0, 0.0), 1).speedup("new", "base")
        hits += low <= 1 <= high
    assert hits / 300 > 0.93


def test_functions_run_in_turns_after_one_untimed_call():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = paired(functions, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert all(len(t) == 3 for t in times.seconds.values()) and times.cores >= 1
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        paired(functions, rounds=0)


def test_a_rest_comes_before_every_timed_call_and_is_not_timed(monkeypatch):
    events = []
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append(f"rest {seconds}"))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or 0.0)
    paired({"a": lambda: events.append("call")}, rounds=2, rest=0.5)
    assert events == ["call", *["rest 0.5", "clock", "call", "clock"] * 2]


def test_waits_for_the_result():
    slow = jax.jit(
        lambda: jax.pure_callback(lambda: time.sleep(0.05) or np.float32(0), jax.ShapeDtypeStruct((), "float32"))
    )
    assert paired({"slow": slow}, rounds=1).seconds["slow"][0] >= 0.05


@pytest.mark.parametrize("bits", [16, 4])
def test_decoder_generates_what_generate_does(bits):
    model, prompt = Llama(CONFIG), np.arange(12, dtype=np.int32).reshape(2, 6)
    params = model.init(jax.random.key(0), prompt)["params"]
    params = compress(rtn(bits, group_size=16), jax.tree.map(lambda x: x * 8, params))[0]
    made = decoder(model, params, prompt, 5)
    expected = generate(model, params, jnp.asarray(prompt), 5, apply=compressed(model.apply))
    np.testing.assert_array_equal(made.run(), expected)
    np.testing.assert_array_equal(made.run(), expected)  # the donated cache of a run is not that of the next
    assert made.tokens == 10
    assert made.memory.arguments >= sum(x.nbytes for x in jax.tree.leaves(params))


def test_memory_of_a_program():
    x = jnp.ones((256, 256))
    memory = program_memory(jax.jit(lambda a, b: (a @ b) @ a).lower(x, x).compile())
    assert memory.arguments == 2 * x.nbytes and memory.outputs == x.nbytes
    assert memory.peak == sum(memory) and memory.temporaries >= x.nbytes
    donated = program_memory(jax.jit(lambda a: a + 1, donate_argnums=0).lower(x).compile())
    assert donated.outputs == 0
