"""Speed and exactness of `pallas_kernels.arbitrary_bit_matmul` on this machine, and of decoding with it.

    python -m experiments.arbitrary_bit_matmul [--parts=errors,decode,one_core,rows,prefill,model] [--rounds=21]

Writes experiments/results/arbitrary_bit_matmul.json and .md: products of LLaMA-7B's shapes at every precision against dense
float32 of XLA, and against PyTorch's products with int4 and int8 weights where the extra `parity` is installed; then greedy
decoding of the embedded model and of a random Llama of 1.1 billion parameters, whose dense form packed runs never make. Parts
that are done are kept in --work and not measured again. Run it on an idle machine: ratios are paired, but caches are shared.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import integer_model
from experiments.cards import Card, Row, command_line, current_commit
from experiments.decode_speed import model_rows
from experiments.runs import launch
from experiments.stages import Stages
from jaxcomp.evaluate.intervals import median_by_order
from pallas_kernels.arbitrary_bit_matmul import BACKENDS, api, arbitrary_bit_matmul, cpu_ffi, pack_dense, unpack_dense
from pallas_kernels.arbitrary_bit_matmul.bench import Candidate, Options, candidate, parse_scheme, rows_of, stream_rate
from pallas_kernels.arbitrary_bit_matmul.shapes import Shape

PAPER = "ABQ-LLM: Zeng et al., AAAI 2025, arXiv 2408.08554"
SCHEMES = "w1a8 w1a16 w2a8 w2a16 w3l5a8 w3a8 w3a16 w4a4 w4a8 w4a8g128 w4a16 w4a16g128 w6a6 w8a8".split()
SQUARE, UP, DOWN = (
    Shape("4096 x 4096", 4096, 4096),
    Shape("11008 x 4096", 11008, 4096),
    Shape("4096 x 11008", 4096, 11008),
)
LARGE = Shape("8192 x 28672", 8192, 28672)
# Speedup over W8A8 of CUTLASS at batch 1 on an RTX 3070 (read from the paper's kernel figure): another baseline than ours.
FIGURE = {"w8a8": 1.1, "w6a6": 1.5, "w4a8": 2.1, "w3a8": 2.7, "w2a8": 7.5}


def speed_rows(found: Sequence[dict[str, Any]], load: float) -> list[Row]:
    """Rows of `bench.rows_of`: speedup over dense float32 with its interval, share of the roofline, microseconds."""
    rows = []
    for r in found:
        ratios = np.array(r["ratios_to_float32"])
        method = f"{r['scheme']}, {r['implementation']}"
        plural = lambda count, name: f"{count} {name}{'s' if count > 1 else ''}"
        setting = f"{r['shape']}, {plural(r['rows'], 'row')}, {plural(usable_cores(), 'core')}, load {load:.1f}"
        note = "" if r["scheme"] not in FIGURE else f"paper, GPU, over its W8A8 baseline: {FIGURE[r['scheme']]}x"
        exact = lambda metric, unit, value: Row(method, setting, metric, unit, value, value, value)  # noqa: B023
        rows += [
            Row(method, setting, "speedup", "", *median_by_order(ratios), None, note),
            exact("roofline_share", "", r["roofline_share"]),
            exact("microseconds", "us", r["microseconds"]),
            exact("bytes", "B", r["bytes"]),
        ]
    return rows


def error_rows() -> list[Row]:
    """Largest error of every implementation of this platform, relative to the largest exact result, at a ragged shape."""
    n, k, rng = 250, 512, np.random.default_rng(0)
    rows = []
    for text in SCHEMES:
        scheme = parse_scheme(text)
        codes = rng.integers(0, scheme.levels or 2**scheme.bits, (n, k)).astype(np.uint8)
        scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, k // (scheme.group_size or k))), jnp.float32)
        x = jnp.asarray(rng.standard_normal((3, k)), jnp.float32)
        packed = pack_dense(jnp.asarray(codes), scheme.bits)
        static = dict(bits=scheme.bits, levels=scheme.levels, act_bits=scheme.act_bits)
        want = exact_product(x, packed, scale, scheme)
        for name in api.preference()[jax.default_backend().replace("gpu", "cuda")]:
            got = np.asarray(arbitrary_bit_matmul(x, packed, scale, implementation=name, **static), np.float64)
            error = float(np.abs(got - want).max() / np.abs(want).max())
            rows.append(Row(f"{text}, {name}", f"{n} x {k}, 3 rows", "max_error", "", error, error, error))
    return rows


def exact_product(x, packed, scale, scheme) -> np.ndarray:
    """The product in float64."""
    codes = np.asarray(unpack_dense(packed, scheme.bits, x.shape[1]), np.float64)
    centre = (scheme.levels or 2**scheme.bits) // 2
    weight = (codes - centre) * np.repeat(np.asarray(scale, np.float64), x.shape[1] // scale.shape[1], 1)
    if scheme.act_bits is None:
        return np.asarray(x, np.float64) @ weight.T
    half = 2 ** (scheme.act_bits - 1)
    step = np.float32(np.abs(x).max(-1, keepdims=True)) / np.float32(half - 1)
    seen = np.clip(np.round(np.asarray(x, np.float32) / step), -half, half - 1).astype(np.float64) * step
    return seen @ weight.T


def torch_peers(working_set: int) -> Callable[[Shape, int], dict[tuple[str, str], Candidate]]:
    """PyTorch's float32, int8 and int4 products on CPU, with the layouts and dtypes in which they are fastest."""
    import torch  # an optional extra

    def peers(shape: Shape, m: int) -> dict[tuple[str, str], Candidate]:
        n, k, group = shape.n, shape.k, 128
        x, copy = torch.randn(m, k), lambda t: t.clone()
        make = lambda call, x, *weights: candidate(torch.inference_mode()(call), x, weights, n, working_set, copy)
        aten = torch.ops.aten
        int4 = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
        int8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        pairs, low = torch.randn(k // group, n, 2, dtype=torch.bfloat16), x.to(torch.bfloat16)
        int4_product = lambda x, w, s: aten._weight_int4pack_mm_for_cpu(x, w, group, s)
        return {
            ("float32", "PyTorch"): make(torch.nn.functional.linear, x, torch.randn(n, k)),
            ("w8a16", "PyTorch"): make(aten._weight_int8pack_mm, low, int8, torch.randn(n, dtype=torch.bfloat16)),
            ("w4a16g128", "PyTorch"): make(int4_product, low, int4, pairs),
        }

    return peers


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pin_to_one_core() -> None:
    """Leaves this process the last of its cores; before jax starts, which counts them."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def on_one_core(rounds: int) -> list[Row]:
    """Decoding by a process with one core, where no product gains or loses by sharing its work among threads."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), pin_to_one_core) as pool:
        return pool.submit(measure, "decode", rounds, (SQUARE, DOWN), ("w2a8", "w4a8", "w4a8g128", "w8a8")).result()


def measure(part: str, rounds: int, shapes: Sequence[Shape] = (), schemes: Sequence[str] = ()) -> list[Row]:
    """The rows of one part; shapes and schemes of "decode" if not all."""
    if part == "errors":
        return error_rows() + integer_model.rows()
    if part == "model":
        return model_rows(rounds)
    if part == "one_core":
        return on_one_core(rounds)
    options = Options(rounds=rounds)
    peers = torch_peers(options.working_set) if importlib.util.find_spec("torch") else None
    rate, load, found = stream_rate(options), os.getloadavg()[0], []
    if part == "decode":
        for shape in shapes or (SQUARE, UP, DOWN, LARGE):
            every = SCHEMES if shape is not LARGE else ["w2a8", "w4a8", "w8a8"]
            found += rows_of(shape, 1, schemes or every, rate, options, peers)
    elif part == "rows":
        for m in (4, 16):
            found += rows_of(SQUARE, m, ["w2a8", "w3a8", "w4a4", "w4a8", "w4a16", "w8a8"], rate, options, peers)
    else:
        options = options._replace(rounds=max(3, rounds // 4), working_set=1)
        for m in (512, 2048):
            found += rows_of(SQUARE, m, ["w2a8", "w4a8", "w4a16", "w8a8"], rate, options, peers)
    return speed_rows(found, load)


PARTS = ("errors", "decode", "one_core", "rows", "prefill", "model")
# (scheme, implementation, shape, least speedup over dense float32): what was promised for decoding one row on a CPU.
BARS = [("w4a8", "xla", SQUARE, 2.0), ("w4a8", "xla", DOWN, 2.0)] + [
    (scheme, "cpu_ffi", DOWN, least) for scheme, least in {"w4a8": 5.0, "w3a8": 4.5, "w2a8": 6.0, "w1a8": 8.0}.items()
]


def departures(rows: Sequence[Row]) -> list[str]:
    """Which bars hold, in numbers, and how the C++ kernel compares with PyTorch's int4 product."""
    times: dict[tuple[str, ...], dict[str, str]] = {}  # (method, shape, rows) -> {cores: speedup}
    for r in (r for r in rows if r.metric == "speedup"):
        shape, count, cores, *_ = r.setting.split(", ")
        times.setdefault((r.method, shape, count), {})[cores] = f"{r.value:.2f}x"
    found = []
    for scheme, name, shape, least in BARS:
        for cores, speedup in times.get((f"{scheme}, {name}", shape.name, "1 row"), {}).items():
            verdict = "holds" if float(speedup[:-1]) >= least else "is missed"
            found.append(
                f"{scheme} by {name} at {shape.name}, one row, {cores}: {speedup}; the bar of {least}x {verdict}."
            )
    for name in (SQUARE.name, DOWN.name):
        methods = ("w4a16g128, PyTorch", "w4a16g128, cpu_ffi", "w4a8g128, cpu_ffi")
        peer, ours, a8 = (times.get((method, name, "1 row"), {}) for method in methods)
        for cores in peer:
            found.append(
                f"4-bit weights in groups of 128 at {name}, one row, {cores}: PyTorch's int4 product (bfloat16) {peer[cores]}, "
                f"the C++ kernel {ours.get(cores, '-')} with float32 and {a8.get(cores, '-')} with 8-bit activations."
            )
    found.append("Speedups are over dense float32 in XLA; the roofline is the rate of updating a large array in place.")
    return found


def timed(part: str, rounds: int) -> dict[str, Any]:
    """{minutes, rows} of a part, JSON-able."""
    start, rows = time.monotonic(), measure(part, rounds)
    return {"minutes": (time.monotonic() - start) / 60, "rows": [vars(row) for row in rows]}


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("parts", list(PARTS), "What to measure.")
    flags.DEFINE_integer("rounds", 21, "Rounds of the medians.", lower_bound=1)
    flags.DEFINE_string("work", "runs/arbitrary_bit_matmul", "Folder of the parts that are done.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")
    flags.DEFINE_boolean("overwrite", False, "Discard what a run with other settings left in --work.")


def main(argv) -> None:
    """Measures and writes the card `arbitrary_bit_matmul`."""
    del argv
    f = flags.FLAGS
    if unknown := set(f.parts) - set(PARTS):
        raise app.UsageError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    if jax.default_backend() == "cpu":
        cpu_ffi.build()
    stages = Stages(f.work, {"rounds": f.rounds, "jax": jax.__version__}, overwrite=f.overwrite)
    done = [stages.run(part, lambda part=part: timed(part, f.rounds)) for part in f.parts]
    rows = [Row(**row) for found in done for row in found["rows"]]
    minutes = sum(found["minutes"] for found in done)
    device = f"{jax.devices()[0].device_kind}, {usable_cores()} cores, jax {jax.__version__}, {', '.join(BACKENDS)}"
    command = command_line("experiments.arbitrary_bit_matmul", sys.argv[1:])
    card = Card("arbitrary_bit_matmul", PAPER, command, current_commit(), device, minutes, [0], rows, departures(rows))
    card.write(f.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
