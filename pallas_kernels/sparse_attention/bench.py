"""Times sparse attention against dense attention of the same machine, paired and interleaved, preprocessing included.

    python -m pallas_kernels.sparse_attention.bench --lengths=4096,16384 --densities=0.1,0.16,0.3,1

Every round runs all candidates once; medians over rounds are reported, of seconds per query head and of ratios within a round.
A density is reached by bisecting the threshold, 1 is threshold 0. Phases are differences of nested programs: the guide that
orders queries, scores, sort, the window (lists of no blocks), and what visiting the lists adds.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pallas_kernels.sparse_attention import api, dense, rank
from pallas_kernels.sparse_attention.shapes import SHAPES, structured_heads

_LENGTHS = flags.DEFINE_list("lengths", ["4096", "8192", "16384"], "Tokens N.")
_SHAPE = flags.DEFINE_enum("shape", "llama3.1-8b/group", list(SHAPES), "Heads.")
_KINDS = flags.DEFINE_list("kinds", ["mixed", "vertical", "topic"], "Kinds of head, one after the other.")
_DENSITIES = flags.DEFINE_list("densities", ["0.16", "1"], "Targets, reached from below.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Names; all of this platform if empty.")
_SEGMENT = flags.DEFINE_integer("segment", 256, "Rows that share a list.")
_BLOCK_Q = flags.DEFINE_integer("block_q", 256, "Rows of a tile.")
_BLOCK_K = flags.DEFINE_integer("block_k", 128, "Keys of a block.")
_GUIDE = flags.DEFINE_enum("guide", "anti_sink", ["anti_sink", "mean_key", "mean_query", "none"], "Order of queries.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of the medians.")
_LARGEST = flags.DEFINE_integer("largest", 2 << 30, "Bytes of N x N scores up to which XLA's own attention takes part.")
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "process"], "process: CPU time, for CPUs shared with others.")
_OUT = flags.DEFINE_string("out", None, "JSON file; standard output otherwise.")


class Problem(NamedTuple):
    """Arrays on the device, of one length and kind."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def attention(implementation: str) -> Callable[..., Any]:
    """(q, k, v, threshold) -> (out, stats), everything from queries to output, in one program."""
    return jax.jit(lambda q, k, v, threshold: _attend(q, k, v, _orders(q, k), threshold, implementation))


def phases(problem: Problem, implementation: str, threshold: float) -> dict[str, Callable[[], Any]]:
    """Nested programs; each does what the one before it does, and one phase more."""
    steps = {
        "guide": lambda q, k, v, tau: _places(q, k),
        "scores": lambda q, k, v, tau: (_places(q, k), _scores(q, k)),
        "sort": lambda q, k, v, tau: _orders(q, k),
        "window": lambda q, k, v, tau: _attend(q, k, v, _orders(q, k), tau, implementation, limit=0),
        "lists": lambda q, k, v, tau: _attend(q, k, v, _orders(q, k), tau, implementation),
    }
    return {
        name: functools.partial(_wait, jax.jit(step), *problem, jnp.float32(threshold)) for name, step in steps.items()
    }


def threshold_for(density: float, problem: Problem, attend: Callable[..., Any], steps: int = 10) -> float:
    """The smallest threshold on a grid of 2^steps whose density does not exceed the target; 0 for a target of 1."""
    if density >= 1:
        return 0.0
    low, high = -24.0, -1.0
    for _ in range(steps):
        middle = (low + high) / 2
        found = float(_density(attend(*problem, jnp.float32(2**middle))[1], problem).mean())
        low, high = (middle, high) if found > density else (low, middle)
    return 2**high


def measure(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, np.ndarray]:
    """Seconds of every call in every round, after one that is not timed; a round runs all of them in turn."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            start = _clock()
            calls[name]()
            seconds[name].append(_clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def results(n: int, kind: str, implementations: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one length and kind: dense attention, sparse attention at every density, its phases at the first one."""
    arrays = structured_heads(np.random.default_rng(n), n, SHAPES[_SHAPE.value], (kind,))
    problem = Problem(*map(jnp.asarray, arrays))
    calls = {("dense", name): call for name, call in dense.peers(*arrays, _LARGEST.value).items()}
    facts = {}
    for name in implementations:
        attend = attention(name)
        for density in map(float, _DENSITIES.value):
            tau = threshold_for(density, problem, attend)
            run = functools.partial(_wait, attend, *problem, jnp.float32(tau))
            out, stats = run()
            calls[name, f"{density:g}"] = run
            facts[name, f"{density:g}"] = _facts(out, stats, tau, problem)
        tau = threshold_for(float(_DENSITIES.value[0]), problem, attend)
        calls |= {(f"{name}/phases", step): call for step, call in phases(problem, name, tau).items()}
    seconds = measure(calls, _ROUNDS.value)
    return [_row(n, kind, key, seconds, facts) for key in seconds]


def main(argv: Sequence[str]) -> None:
    """Measures, prints a line per result and writes JSON."""
    del argv
    platform = jax.default_backend().replace("gpu", "cuda")
    names = _IMPLEMENTATIONS.value or api.preference().get(platform, ("xla",))
    rows = []
    for n in map(int, _LENGTHS.value):
        for kind in _KINDS.value:
            for row in results(n, kind, names):
                rows.append(row)
                print("N={length} {kind} {method} {setting}: {milliseconds:.2f} ms per head".format(**row), end="")
                print("".join(f", {v:.2f}x {name}" for name, v in row["speedup"].items()), flush=True)
    settings = {"segment": _SEGMENT.value, "block_q": _BLOCK_Q.value, "block_k": _BLOCK_K.value, "guide": _GUIDE.value}
    device = {"platform": platform, "kind": jax.devices()[0].device_kind, "clock": _CLOCK.value}
    text = json.dumps(
        {"device": device, "shape": SHAPES[_SHAPE.value]._asdict(), "settings": settings, "rows": rows}, indent=1
    )
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(text + "\n")
    else:
        print(text)


def _wait(f, *args):
    return jax.block_until_ready(f(*args))


def _places(q, k):
    return rank.query_order(q, k, segment=_SEGMENT.value, guide=_GUIDE.value)


def _orders(q, k):
    return rank.key_order(q, k, segment=_SEGMENT.value), _places(q, k)


def _scores(q, k):
    """Pooled scores of all segments, reduced to one number each: ranking without its sort."""
    pooled = rank.pooled_queries(q, segment=_SEGMENT.value, pool=None, heads=q.shape[0], rows=None)
    everything = jnp.ones(k.shape[1], bool)
    return jax.lax.map(lambda p: rank.key_scores(p, k, everything).max(-1), pooled.swapaxes(0, 1))


def _attend(q, k, v, orders, threshold, implementation, limit=None):
    order, places = orders
    if limit is not None:
        limit = jnp.full(order.shape[:2], limit, jnp.int32)
    blocks = {"segment": _SEGMENT.value, "block_q": _BLOCK_Q.value, "block_k": _BLOCK_K.value}
    return api.sparse_attention(
        q, k, v, order, **blocks, threshold=threshold, query_order=places, limit=limit, implementation=implementation
    )


def _density(stats, problem: Problem) -> jax.Array:
    blocks = {"segment": _SEGMENT.value, "block_q": _BLOCK_Q.value, "block_k": _BLOCK_K.value}
    return api.density(stats, length=problem.q.shape[1], **blocks)


def _facts(out, stats, tau, problem: Problem) -> dict[str, float]:
    exact = jax.jit(dense.chunked_attention)(*problem)
    error = float(jnp.mean((out - exact) ** 2))
    return {"threshold": tau, "density": float(_density(stats, problem).mean()), "mse": error}


def _row(n, kind, key, seconds, facts) -> dict[str, Any]:
    """Medians of one candidate, and of its ratios to every dense one."""
    heads = SHAPES[_SHAPE.value].query_heads
    ratio = lambda base: float(np.median(seconds[base] / seconds[key]))
    speedup = {} if key[0].endswith("/phases") else {b[1]: ratio(b) for b in seconds if b[0] == "dense" and b != key}
    row = {"length": n, "kind": kind, "method": key[0], "setting": key[1]}
    times = {
        "milliseconds": 1e3 * float(np.median(seconds[key])) / heads,
        "seconds": list(seconds[key]),
        "speedup": speedup,
    }
    return row | times | facts.get(key, {})


def _clock() -> float:
    return time.perf_counter() if _CLOCK.value == "wall" else time.process_time()


if __name__ == "__main__":
    app.run(main)
