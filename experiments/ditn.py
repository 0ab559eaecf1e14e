"""DITN's deployment rewrites: LayerNorm, its tanh substitute, and the substitute merged into the next linear map.

    python -m experiments.ditn [--sizes=64,128] [--rounds=9] [--out=experiments/results]

Random weights: times and exactness do not depend on them, and the authors publish none. Needs no data.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.cards import Card, Row, current_commit
from experiments.ntire_esr import exact, median_interval
from jaxcomp.evaluate.complexity import complexity
from jaxcomp.evaluate.throughput import Paired, paired
from jaxcomp.models.ditn import DITN, Norm, ditn_real, ditn_tiny, merge_norm, substitute_norm

LABELS: Mapping[Norm, str] = {"layer": "LayerNorm (DITN-Tiny)", "tanh": "tanh (DITN-Real)", "merged": "tanh, merged"}
POSTER = {"tanh": 16 / 11}  # latency of DITN-Tiny over that of DITN-Real, x4
NOTE = "Paper: x4 latencies of 16 and 11 ms in TensorRT on a static input, read from the authors' poster"
DEPARTURES = (
    "The authors publish no weights and no definition of DITN-Tiny; its layer counts are those of DITN-Real.",
    "No PSNR: nothing was trained, and the authors' tables of PSNR are not at hand.",
    "The paper times TensorRT on a GPU, this card XLA on a CPU; why the ratios differ was not examined. Unmerged, tanh "
    "replaces LayerNorm by two more matrix products per layer.",
    "Where the interval of a ratio holds 1, the run does not tell the forms apart; the load is that of the whole machine.",
)


def networks() -> dict[Norm, tuple[DITN, Any]]:
    """DITN x4 in the three forms, the latter two rewritten from the one before."""
    tiny, real = ditn_tiny(), ditn_real()
    layer = jax.jit(tiny.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    tanh = spread(substitute_norm(layer), 0)
    return {"layer": (tiny, layer), "tanh": (real, tanh), "merged": (real.clone(norm="merged"), merge_norm(tanh))}


def spread(params: Any, seed: int) -> Any:
    """The params with noise, so that no bias or gain is at its initial zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), params)


def measure(size: int, rounds: int, models: Mapping[Norm, tuple[DITN, Any]]) -> tuple[Paired, float]:
    """Interleaved times of all forms at `size` x `size`, and the error of the merge as a share of the output's span."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, size, size, 3)), jnp.float32)
    functions = {}
    for name, (model, params) in models.items():
        program = jax.jit(lambda params, x, model=model: model.apply({"params": params}, x)).lower(params, x).compile()
        functions[name] = lambda program=program, params=params: program(params, x)
    plain, merged = (np.asarray(functions[name]()) for name in ("tanh", "merged"))
    return paired(functions, rounds), float(np.abs(plain - merged).max() / np.ptp(plain))


def rows(size: int, times: Paired, error: float, models: Mapping[Norm, tuple[DITN, Any]]) -> list[Row]:
    """Costs, times and ratios of all forms."""
    setting, found = f"{size} x {size}, x4, float32, batch 1, load {max(times.load):.1f}", []
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    for name, (model, params) in models.items():
        label = LABELS[name]
        apply = lambda params, x, model=model: model.apply({"params": params}, x)
        count = complexity(apply, params, image)
        milliseconds = times.seconds[name] * 1e3
        paper = POSTER.get(name)
        found += [
            Row(label, setting, *exact("params", "", count.params)),
            Row(label, setting, *exact("MACs", "G", count.macs / 1e9)),
            Row(label, setting, "time", "ms", float(np.median(milliseconds)), *median_interval(milliseconds)),
            Row(
                label,
                setting,
                "speedup over LayerNorm",
                "",
                *times.speedup(name, "layer"),
                paper,
                NOTE if paper else "",
            ),
        ]
    return [*found, Row(LABELS["merged"], setting, *exact("largest difference from tanh, of the span", "", error))]


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("sizes", ["64", "128"], "Heights and widths of the low-resolution input.")
    flags.DEFINE_integer("rounds", 9, "Timed runs of each form, interleaved.", lower_bound=1)
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Measures and writes the card `ditn`."""
    del argv
    start, args, models = time.monotonic(), flags.FLAGS, networks()
    found, loads = [], []
    for size in map(int, args.sizes):
        times, error = measure(size, args.rounds, models)
        found += rows(size, times, error, models)
        loads += times.load
    paper = "Unfolding Once is Enough: A Deployment-Friendly Transformer Unit for Super-Resolution, ACM MM 2023, arXiv 2308.02794"
    command = shlex.join(["python", "-m", "experiments.ditn", *sys.argv[1:]])
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {max(loads):.1f}, jax {jax.__version__}"
    minutes = (time.monotonic() - start) / 60
    card = Card("ditn", paper, command, current_commit(), device, minutes, [0], found, DEPARTURES)
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    app.run(main)
