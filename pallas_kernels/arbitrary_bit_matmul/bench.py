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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pallas_kernels.arbitrary_bit_matmul import api, packing
from pallas_kernels.arbitrary_bit_matmul.shapes import SHAPES, Shape
from pallas_kernels.arbitrary_bit_matmul.spec import WeightSpec


class Options(NamedTuple):
    """How to measure: see the flags of the same names.

    Attributes:
      implementations: names; empty for all of this platform.
      rounds: of the medians.
      working_set: bytes of copies of every weight.
      clock: seconds of the moment.
    """

    implementations: Sequence[str] = ()
    rounds: int = 21
    working_set: int = 256 << 20
    clock: Callable[[], float] = time.perf_counter


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


Peers = Callable[[Shape, int], dict[tuple[str, str], Candidate]]  # (shape, rows) -> other libraries' products


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


def spec_of(shape: Shape, scheme: Scheme) -> WeightSpec:
    """The static facts of a weight. Raises ValueError where groups do not divide K."""
    groups = shape.k // scheme.group_size if scheme.group_size else 1
    return WeightSpec(shape.n, shape.k, groups, scheme.bits, scheme.levels)


def dense(shape: Shape, x: jax.Array, dtype, working_set: int) -> Candidate:
    """x [M, K] times a dense [K, N]."""
    w = jax.random.normal(jax.random.key(0), (shape.k, shape.n), dtype)
    x = x.astype(dtype)
    return candidate(jax.jit(lambda x, w: x @ w), x, (w,), shape.n, working_set)


def quantized(shape: Shape, x: jax.Array, scheme: Scheme, implementation: str, working_set: int) -> Candidate:
    """The same product with a random weight, prepared for the implementation. Raises ExceptionGroup if that refuses."""
    spec = spec_of(shape, scheme)
    codes = np.random.default_rng(0).integers(0, scheme.levels or 2**scheme.bits, (spec.n, spec.k)).astype(np.uint8)
    packed = packing.pack_dense(jnp.asarray(codes), spec.bits)
    scale = jnp.full((spec.n, spec.groups), 0.01, jnp.float32)
    static = {"bits": spec.bits, "levels": spec.levels}
    api.choose(spec, x, packed, [implementation])
    weight = api.prepare(packed, k=spec.k, groups=spec.groups, implementation=implementation, **static)
    call = functools.partial(
        api.arbitrary_bit_matmul, act_bits=scheme.act_bits, implementation=implementation, **static
    )
    return candidate(jax.jit(call), x, (weight, scale), spec.n, working_set)


def candidate(call: Callable[..., Any], x: Any, weights: tuple, n: int, working_set: int, copy=jnp.copy) -> Candidate:
    """`call(x, *weights)` with copies of the weights until they fill the working set; the function is compiled and warm."""
    leaves = jax.tree.leaves(weights)
    stored = sum(
        math.ceil(leaf.size * _bits(leaf.dtype) / 8) if isinstance(leaf, jax.Array) else leaf.nbytes for leaf in leaves
    )
    copies = [weights, *(jax.tree.map(copy, weights) for _ in range(min(64, working_set // stored)))]
    jax.block_until_ready([call(x, *w) for w in copies])
    return Candidate(call, x, copies, stored + x.nbytes + 4 * x.shape[0] * n)


def measure(candidates: Mapping[Any, Candidate], options: Options) -> dict[Any, np.ndarray]:
    """Seconds of every candidate in every round; a round runs all of them in turn."""
    seconds = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, timed in candidates.items():
            start = options.clock()
            jax.block_until_ready([timed.call(timed.x, *w) for w in timed.copies])
            seconds[name].append((options.clock() - start) / len(timed.copies))
    return {name: np.array(values) for name, values in seconds.items()}


def stream_rate(options: Options) -> float:
    """Bytes per second of updating a large array in place: the roofline of memory-bound products."""
    update = jax.jit(lambda a: a + 1, donate_argnums=0)
    a, seconds = update(jnp.zeros(options.working_set // 4, jnp.float32)), []
    for _ in range(options.rounds):
        start = options.clock()
        a = jax.block_until_ready(update(a))
        seconds.append(options.clock() - start)
    return 2 * a.nbytes / float(np.median(seconds))


def rows_of(
    shape: Shape, m: int, schemes: Sequence[str], rate: float, options: Options, peers: Peers | None = None
) -> list[dict[str, Any]]:
    """Result rows of one shape: dense products, every scheme by every implementation that covers it, then `peers(shape, m)`."""
    x = jax.random.normal(jax.random.key(1), (m, shape.k), jnp.float32)
    size = options.working_set
    candidates = {("dense", str(jnp.dtype(t))): dense(shape, x, t, size) for t in (jnp.float32, jnp.bfloat16)}
    names = options.implementations or api.platform_preference()
    for scheme in schemes:
        for name in names:
            try:
                candidates[scheme, name] = quantized(shape, x, parse_scheme(scheme), name, size)
            except ExceptionGroup as refusal:
                print(f"{shape.name} {scheme}: {refusal.exceptions[0]}", flush=True)
    candidates |= {} if peers is None else peers(shape, m)
    seconds = measure(candidates, options)
    ratio = lambda key, dtype: np.sort(seconds["dense", dtype] / seconds[key])
    median = lambda key, dtype: float(np.median(ratio(key, dtype)))
    return [
        {
            "shape": shape.name,
            "n": shape.n,
            "k": shape.k,
            "rows": m,
            "scheme": scheme,
            "implementation": name,
            "microseconds": 1e6 * float(np.median(seconds[scheme, name])),
            "bytes": timed.moved,
            "roofline_share": timed.moved / rate / float(np.median(seconds[scheme, name])),
            "speedup_over_float32": median((scheme, name), "float32"),
            "speedup_over_bfloat16": median((scheme, name), "bfloat16"),
            "ratios_to_float32": ratio((scheme, name), "float32").tolist(),
        }
        for (scheme, name), timed in candidates.items()
    ]


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_list("shapes", ["llama7b/attention", "llama7b/gate_up"], "Names of `shapes`, or NxK.")
    flags.DEFINE_list("schemes", ["w8a8", "w4a8", "w4a8g128", "w4a16g128", "w3a8", "w2a8", "w3l5a8"], "See above.")
    flags.DEFINE_list("rows", ["1"], "Rows of activations.")
    flags.DEFINE_list("implementations", [], "Names; all of this platform if empty.")
    flags.DEFINE_integer("rounds", 21, "Rounds of the medians.")
    flags.DEFINE_integer("working_set", 256 << 20, "Bytes of copies of every weight, to defeat caches.")
    flags.DEFINE_enum("clock", "wall", ["wall", "process"], "process: CPU time, for CPUs shared with others.")
    flags.DEFINE_string("out", None, "JSON file; standard output otherwise.")


def given_options() -> Options:
    """What the flags of `define_flags` say."""
    f = flags.FLAGS
    clock = time.perf_counter if f.clock == "wall" else time.process_time
    return Options(f.implementations, f.rounds, f.working_set, clock)


def main(argv: Sequence[str]) -> None:
    """Measures, prints a line per result and writes JSON."""
    del argv
    f, options = flags.FLAGS, given_options()
    rate = stream_rate(options)
    results = []
    for shape in map(parse_shape, f.shapes):
        for m in map(int, f.rows):
            for row in rows_of(shape, m, f.schemes, rate, options):
                results.append(row)
                print(
                    "{shape} M={rows} {scheme} {implementation}: {microseconds:.0f} us, {bytes} bytes, ".format(**row),
                    end="",
                )
                print("{roofline_share:.0%} of roofline, {speedup_over_float32:.2f}x float32".format(**row), flush=True)
    device = {"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "clock": f.clock}
    text = json.dumps({"device": device, "stream_bytes_per_second": rate, "results": results}, indent=1)
    if f.out:
        pathlib.Path(f.out).write_text(text + "\n")
    else:
        print(text)


def _bits(dtype) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


if __name__ == "__main__":
    define_flags()
    app.run(main)
