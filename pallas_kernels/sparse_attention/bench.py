"""Times sparse attention against dense attention of the same machine, paired and interleaved, preprocessing included.

    python -m pallas_kernels.sparse_attention.bench [--lengths=4096,131072] [--densities=0.1,0.16,0.3,1]

Every round runs all candidates once; medians over rounds are reported, of seconds per query head and of ratios within a round.
A density is reached by bisecting the threshold, 1 is threshold 0. Phases are differences of nested programs: the guide that
orders queries, scores, sort, the window (lists of no blocks), and what visiting the lists adds.
"""

from __future__ import annotations

import dataclasses
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

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LONGEST_ON_CPU = 32768  # dense attention beyond takes minutes a round


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
      shape: heads, a name of `SHAPES`.
      densities: targets, reached from below by bisecting the threshold; 1 is threshold 0. Phases are those at the first one.
      implementations: names; all of this platform if empty.
      segment: rows that share a list.
      block_q: rows of a tile.
      block_k: keys of a block.
      guide: order of queries.
      rounds: of the medians.
      largest: bytes of N x N scores up to which XLA's own attention takes part.
      clock: "wall", or "process" for CPU time where CPUs are shared with others.
    """

    shape: str = "llama3.1-8b/group"
    densities: Sequence[float] = (0.16, 1.0)
    implementations: Sequence[str] = ()
    segment: int = 256
    block_q: int = 256
    block_k: int = 128
    guide: str = "anti_sink"
    rounds: int = 5
    largest: int = 2 << 30
    clock: str = "wall"

    @property
    def blocks(self) -> dict[str, int]:
        """Sizes, as keyword arguments."""
        return {"segment": self.segment, "block_q": self.block_q, "block_k": self.block_k}


class Problem(NamedTuple):
    """Arrays on the device, of one length and kind."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def ranking(q, k, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """(order of keys, order of queries)."""
    return rank.key_order(q, k, segment=options.segment), _places(q, k, options)


def attention(implementation: str, options: Options) -> Callable[..., Any]:
    """(q, k, v, threshold) -> (out, stats), everything from queries to output, in one program."""
    return jax.jit(lambda q, k, v, tau: _attend(q, k, v, ranking(q, k, options), tau, implementation, options))


def phases(problem: Problem, implementation: str, threshold: float, options: Options) -> dict[str, Callable[[], Any]]:
    """Nested programs; each does what the one before it does, and one phase more."""
    visit = functools.partial(_attend, implementation=implementation, options=options)
    steps = {
        "guide": lambda q, k, v, tau: _places(q, k, options),
        "scores": lambda q, k, v, tau: (_places(q, k, options), _scores(q, k, options)),
        "sort": lambda q, k, v, tau: ranking(q, k, options),
        "window": lambda q, k, v, tau: visit(q, k, v, ranking(q, k, options), tau, limit=0),
        "lists": lambda q, k, v, tau: visit(q, k, v, ranking(q, k, options), tau),
    }
    return {
        name: functools.partial(_wait, jax.jit(step), *problem, jnp.float32(threshold)) for name, step in steps.items()
    }


def threshold_for(density: float, problem: Problem, attend: Callable[..., Any], options: Options) -> float:
    """The smallest threshold, to 7 %, whose density does not exceed the target; 0 for a target of 1."""
    if density >= 1:
        return 0.0
    low, high = -24.0, -1.0
    while high - low > 0.1:
        middle = (low + high) / 2
        found = _density(attend(*problem, jnp.float32(2**middle))[1], problem, options)
        low, high = (middle, high) if found > density else (low, middle)
    return 2**high


def default_lengths(platform: str) -> tuple[int, ...]:
    """Tokens to measure at where none are asked for."""
    return tuple(n for n in LENGTHS if platform != "cpu" or n <= LONGEST_ON_CPU)


def measure(calls: dict[Any, Callable[[], Any]], options: Options) -> dict[Any, np.ndarray]:
    """Seconds of every call in every round, after one that is not timed; a round runs all of them in turn."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for i in range(options.rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def results(n: int, kind: str, options: Options) -> list[dict[str, Any]]:
    """Rows of one length and kind: dense attention, sparse attention at every density, its phases at the first one.

    All implementations stop at the same blocks: thresholds are found, and phases timed, with the first of them.
    """
    arrays = structured_heads(np.random.default_rng(n), n, SHAPES[options.shape], (kind,))
    problem = Problem(*map(jnp.asarray, arrays))
    calls = {("dense", name): call for name, call in dense.peers(*arrays, options.largest).items()}
    exact, facts = jax.jit(dense.chunked_attention)(*problem), {}
    names = options.implementations or api.preference().get(_platform(), ("xla",))
    first = attention(names[0], options)
    thresholds = [threshold_for(d, problem, first, options) for d in options.densities]
    for name in names:
        attend = attention(name, options)
        for density, tau in zip(options.densities, thresholds, strict=True):
            key = name, f"{density:g}"
            calls[key] = functools.partial(_wait, attend, *problem, jnp.float32(tau))
            out, stats = calls[key]()
            error = float(jnp.mean((out - exact) ** 2))
            facts[key] = {"threshold": tau, "density": _density(stats, problem, options), "mse": error}
    steps = phases(problem, names[0], thresholds[0], options)
    calls |= {(f"{names[0]}/phases", step): call for step, call in steps.items()}
    seconds = measure(calls, options)
    return [_row(n, kind, key, seconds, options) | facts.get(key, {}) for key in seconds]


def define_flags() -> None:
    """The flags of the command line: `Options`, lengths, kinds, output."""
    for field in dataclasses.fields(Options):
        text = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        define = flags.DEFINE_list if isinstance(field.default, tuple) else flags.DEFINE_string
        define(field.name, text if text else None, "See `Options`.")
    flags.DEFINE_list("lengths", None, f"Tokens N; all of {LENGTHS} by default, those up to {LONGEST_ON_CPU} on CPU.")
    flags.DEFINE_list("kinds", ["mixed", "vertical", "topic"], "Kinds of head, one after the other.")
    flags.DEFINE_string("out", None, "JSON file; standard output otherwise.")


def main(argv: Sequence[str]) -> None:
    """Measures, prints a line per result and writes JSON."""
    del argv
    f = flags.FLAGS
    given = {field.name: getattr(f, field.name) or field.default for field in dataclasses.fields(Options)}
    numbers = {name: int(given[name]) for name in ("segment", "block_q", "block_k", "rounds", "largest")}
    options = Options(**given | numbers | {"densities": tuple(map(float, given["densities"]))})
    rows = []
    for n in map(int, f.lengths or default_lengths(_platform())):
        for kind in f.kinds:
            for row in results(n, kind, options):
                rows.append(row)
                print("N={length} {kind} {method} {setting}: {milliseconds:.2f} ms per head".format(**row), end="")
                print("".join(f", {v:.2f}x {name}" for name, v in row["speedup"].items()), flush=True)
    device = {"platform": _platform(), "kind": jax.devices()[0].device_kind}
    text = json.dumps({"device": device, "options": dataclasses.asdict(options), "rows": rows}, indent=1)
    if f.out:
        pathlib.Path(f.out).write_text(text + "\n")
    else:
        print(text)


def _wait(f, *args):
    return jax.block_until_ready(f(*args))


def _places(q, k, options):
    return rank.query_order(q, k, segment=options.segment, guide=options.guide)


def _scores(q, k, options):
    """Pooled scores of all segments, reduced to one number each: ranking without its sort."""
    pooled = rank.pooled_queries(q, segment=options.segment, pool=None, heads=q.shape[0], rows=None)
    score = lambda p: rank.key_scores(p, k, jnp.ones(k.shape[1], bool)).max(-1)
    return jax.lax.map(score, pooled.swapaxes(0, 1), batch_size=rank.SEGMENTS_AT_ONCE)


def _attend(q, k, v, orders, threshold, implementation, options, limit=None):
    order, places = orders
    if limit is not None:
        limit = jnp.full(order.shape[:2], limit, jnp.int32)
    chosen = {"threshold": threshold, "query_order": places, "limit": limit, "implementation": implementation}
    return api.sparse_attention(q, k, v, order, **options.blocks, **chosen)


def _density(stats, problem: Problem, options: Options) -> float:
    return float(api.density(stats, length=problem.q.shape[1], **options.blocks).mean())


def _row(n, kind, key, seconds, options) -> dict[str, Any]:
    """Medians of one candidate, and of its ratios to every dense one."""
    ratio = lambda base: float(np.median(seconds[base] / seconds[key]))
    speedup = {} if key[0].endswith("/phases") else {b[1]: ratio(b) for b in seconds if b[0] == "dense" and b != key}
    per_head = 1e3 * float(np.median(seconds[key])) / SHAPES[options.shape].query_heads
    row = {"length": n, "kind": kind, "method": key[0], "setting": key[1], "milliseconds": per_head}
    return row | {"seconds": list(seconds[key]), "speedup": speedup}


def _platform() -> str:
    return jax.default_backend().replace("gpu", "cuda")


if __name__ == "__main__":
    define_flags()
    app.run(main)
