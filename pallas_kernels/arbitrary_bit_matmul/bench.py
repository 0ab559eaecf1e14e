"""Times every implementation against dense products of the same machine, paired and interleaved.

    python -m pallas_kernels.arbitrary_bit_matmul.bench --shapes=llama7b/attention,4096x11008 --schemes=w4a8g128,w2a16

A scheme is w<bits>[l<levels>]a<bits>[g<group>]; a16 keeps activations in floating point. Every round runs all candidates once,
each over as many copies of its weight as exceed the caches; medians over rounds are reported, of times and of ratios within one.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pallas_kernels.arbitrary_bit_matmul import api, packing
from pallas_kernels.arbitrary_bit_matmul.shapes import SHAPES, Shape
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec

_SHAPES = flags.DEFINE_list("shapes", ["llama7b/attention", "llama7b/gate_up"], "Names of `shapes`, or NxK.")
_SCHEMES = flags.DEFINE_list(
    "schemes", ["w8a8", "w4a8", "w4a8g128", "w4a16g128", "w3a8", "w2a8", "w3l5a8"], "See above."
)
_ROWS = flags.DEFINE_list("rows", ["1"], "Rows of activations.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "Names; all of this platform if empty.")
_ROUNDS = flags.DEFINE_integer("rounds", 21, "Rounds of the medians.")
_WORKING_SET = flags.DEFINE_integer("working_set", 256 << 20, "Bytes of copies of every weight, to defeat caches.")
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "process"], "process: CPU time, for CPUs shared with others.")
_OUT = flags.DEFINE_string("out", None, "JSON file; standard output otherwise.")


class Scheme(NamedTuple):
    """Bits of weights and activations (None: floating point), levels, and columns per scale (0: all)."""

    bits: int
    levels: int
    act_bits: int | None
    group_size: int


class Candidate(NamedTuple):
    """One call to time: the compiled function, its activations, and copies of its other arguments."""

    call: Callable[..., jax.Array]
    x: jax.Array
    copies: list[tuple]
    moved: int


def parse_scheme(text: str) -> Scheme:
    """Raises ValueError for what is no scheme."""
    match = re.fullmatch(r"w([1-8])(?:l(\d+))?a([1-8]|16)(?:g(\d+))?", text)
    if match is None:
        raise ValueError(
            f"scheme {text!r}: expected w<bits>[l<levels>]a<bits>[g<group>], for example w4a8g128 or w3l5a16"
        )
    bits, levels, act_bits, group = (int(g or 0) for g in match.groups())
    return Scheme(bits, levels, None if act_bits == 16 else act_bits, group)


def parse_shape(text: str) -> Shape:
    """Raises ValueError for what is neither a name nor NxK."""
    if text in SHAPES:
        return SHAPES[text]
    if (match := re.fullmatch(r"(\d+)x(\d+)", text)) is None:
        raise ValueError(f"shape {text!r}: expected NxK or one of {', '.join(SHAPES)}")
    return Shape(text, int(match[1]), int(match[2]))


def dense(shape: Shape, x: jax.Array, dtype) -> Candidate:
    """x [M, K] times a dense [K, N]."""
    w = jax.random.normal(jax.random.key(0), (shape.k, shape.n), dtype)
    x = x.astype(dtype)
    return _candidate(jax.jit(lambda x, w: x @ w), x, (w,), shape.n)


def quantized(shape: Shape, x: jax.Array, scheme: Scheme, implementation: str) -> Candidate:
    """The same product with a random weight, prepared for the implementation. Raises ExceptionGroup if that refuses."""
    spec = WeightSpec(shape.n, shape.k, shape.k // (scheme.group_size or shape.k), scheme.bits, scheme.levels)
    codes = np.random.default_rng(0).integers(0, scheme.levels or 2**scheme.bits, (spec.n, spec.k)).astype(np.uint8)
    packed = packing.pack_dense(jnp.asarray(codes), spec.bits)
    scale = jnp.full((spec.n, spec.groups), 0.01, jnp.float32)
    static = {"bits": spec.bits, "levels": spec.levels}
    api.choose(spec, x, packed, [implementation])
    weight = api.prepare(packed, k=spec.k, groups=spec.groups, implementation=implementation, **static)
    call = functools.partial(
        api.arbitrary_bit_matmul, act_bits=scheme.act_bits, implementation=implementation, **static
    )
    return _candidate(jax.jit(call), x, (weight, scale), spec.n)


def _candidate(call, x, weights, n) -> Candidate:
    stored = sum(math.ceil(a.size * _bits(a.dtype) / 8) for a in jax.tree.leaves(weights))
    copies = [weights, *(jax.tree.map(jnp.copy, weights) for _ in range(min(64, _WORKING_SET.value // stored)))]
    jax.block_until_ready([call(x, *w) for w in copies])
    return Candidate(call, x, copies, stored + x.nbytes + 4 * x.shape[0] * n)


def measure(candidates: dict[str, Candidate], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every candidate in every round; a round runs all of them in turn."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = _clock()
            jax.block_until_ready([candidate.call(candidate.x, *w) for w in candidate.copies])
            seconds[name].append((_clock() - start) / len(candidate.copies))
    return {name: np.array(values) for name, values in seconds.items()}


def stream_rate(rounds: int = 9) -> float:
    """Bytes per second of updating a large array in place: the roofline of memory-bound products."""
    update = jax.jit(lambda a: a + 1, donate_argnums=0)
    a, seconds = update(jnp.zeros(_WORKING_SET.value // 4, jnp.float32)), []
    for _ in range(rounds):
        start = _clock()
        a = jax.block_until_ready(update(a))
        seconds.append(_clock() - start)
    return 2 * a.nbytes / float(np.median(seconds))


def rows_of(shape: Shape, m: int, schemes: Sequence[str], rate: float) -> list[dict[str, Any]]:
    """Result rows of one shape: dense products first, then every scheme by every implementation that covers it."""
    x = jax.random.normal(jax.random.key(1), (m, shape.k), jnp.float32)
    candidates = {("dense", str(jnp.dtype(t))): dense(shape, x, t) for t in (jnp.float32, jnp.bfloat16)}
    names = _IMPLEMENTATIONS.value or api.preference().get(jax.default_backend().replace("gpu", "cuda"), ("xla",))
    for scheme in schemes:
        for name in names:
            try:
                candidates[scheme, name] = quantized(shape, x, parse_scheme(scheme), name)
            except ExceptionGroup as refusal:
                print(f"{shape.name} {scheme}: {refusal.exceptions[0]}", flush=True)
    seconds = measure(candidates, _ROUNDS.value)
    ratio = lambda key, dtype: float(np.median(seconds["dense", dtype] / seconds[key]))
    return [
        {
            "shape": shape.name,
            "n": shape.n,
            "k": shape.k,
            "rows": m,
            "scheme": scheme,
            "implementation": name,
            "microseconds": 1e6 * float(np.median(seconds[scheme, name])),
            "bytes": candidate.moved,
            "roofline_share": candidate.moved / rate / float(np.median(seconds[scheme, name])),
            "speedup_over_float32": ratio((scheme, name), "float32"),
            "speedup_over_bfloat16": ratio((scheme, name), "bfloat16"),
        }
        for (scheme, name), candidate in candidates.items()
    ]


def main(argv: Sequence[str]) -> None:
    """Measures, prints a line per result and writes JSON."""
    del argv
    rate = stream_rate()
    results = []
    for shape in map(parse_shape, _SHAPES.value):
        for m in map(int, _ROWS.value):
            for row in rows_of(shape, m, _SCHEMES.value, rate):
                results.append(row)
                print(
                    "{shape} M={rows} {scheme} {implementation}: {microseconds:.0f} us, {bytes} bytes, ".format(**row),
                    end="",
                )
                print("{roofline_share:.0%} of roofline, {speedup_over_float32:.2f}x float32".format(**row), flush=True)
    device = {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "clock": _CLOCK.value}
    text = json.dumps({"device": device, "stream_bytes_per_second": rate, "results": results}, indent=1)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(text + "\n")
    else:
        print(text)


def _clock() -> float:
    return time.perf_counter() if _CLOCK.value == "wall" else time.process_time()


def _bits(dtype) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


if __name__ == "__main__":
    app.run(main)
