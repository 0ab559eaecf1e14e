"""Speed of `pallas_kernels.sparse_attention` on this machine against dense attention, preprocessing included.

    python -m experiments.sparse_attention_speed [--parts=mixed:4096,mixed:16384] [--rounds=5]

Writes experiments/results/sparse_attention.json and .md: one key head of Llama-3.1-8B and its four query heads on structured
inputs, chunked attention in XLA, XLA's own and PyTorch's on CPU, and every phase of the sparse kernels. What is done is kept in
--work and not measured again. Run it on an idle machine: ratios are paired, but caches are shared.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.cards import Card, Row, current_commit, current_device
from experiments.runs import launch
from experiments.stages import Stages
from jaxcomp.evaluate.intervals import median_by_order
from pallas_kernels.sparse_attention import cpu_ffi
from pallas_kernels.sparse_attention.bench import Options, results
from pallas_kernels.sparse_attention.shapes import SHAPES

COMMAND = "python -m experiments.sparse_attention_speed"
PAPER = "S2O: Zhang et al., ACL 2026, arXiv 2602.22575"
CLAIM = "paper: 7.51x over FlashAttention-2 on a GPU at 128K tokens of Llama-3.1-8B, at a density it does not state"
PARTS = [f"mixed:{n}" for n in (4096, 8192, 16384, 32768)] + ["vertical:16384", "topic:16384", "stripe:16384"]
BAR, DENSITY, LENGTH = 3.0, 0.16, 16384  # least speedup over the best dense attention in XLA


def rows_of(found: Sequence[Mapping[str, Any]], heads: int) -> list[Row]:
    """Rows of one length and kind: milliseconds per head, speedups over each dense attention, density, error, phases."""
    seconds = {(r["method"], r["setting"]): np.array(r["seconds"]) for r in found}
    rows = []
    for r in found:
        name, setting = r["method"], f"{r['kind']} heads, {r['length']} tokens"
        own = seconds[name, r["setting"]]
        if name.endswith("/phases"):
            rows.append(
                Row(
                    f"{name[:-7]}, up to {r['setting']}",
                    setting,
                    "time",
                    "ms/head",
                    *median_by_order(1e3 * own / heads),
                )
            )
            continue
        method = f"dense, {r['setting']}" if name == "dense" else f"{name}, target density {float(r['setting']):g}"
        rows.append(Row(method, setting, "time", "ms/head", *median_by_order(1e3 * own / heads)))
        if name == "dense":
            continue
        for peer in r["speedup"]:
            note = CLAIM if peer.startswith("chunked") else ""
            ratio = median_by_order(seconds["dense", peer] / own)
            rows.append(Row(method, setting, f"speedup over {peer}", "", *ratio, None, note))
        exact = lambda metric, value: Row(method, setting, metric, "", value, value, value)  # noqa: B023
        rows += [exact("density", r["density"]), exact("mse", r["mse"])]
    return rows


def departures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the bar holds, in numbers, kind by kind."""
    texts = [
        "The paper measures Triton kernels on a GPU; these are CPU kernels against dense attention of the same CPU."
    ]
    texts.append(
        "Intervals are those of a median of few rounds, often their range: wide ones mean that other work shared the CPUs."
    )
    return texts + [_verdict(r) for r in found if _is_claimed(r)] + _planning(found)


def _is_claimed(r: Mapping[str, Any]) -> bool:
    sparse = r["method"] != "dense" and not r["method"].endswith("/phases")
    return sparse and r["method"] != "xla" and r["length"] == LENGTH and r["density"] <= DENSITY


def _verdict(r: Mapping[str, Any]) -> str:
    slowest = min((v, name) for name, v in r["speedup"].items() if name != "torch")
    torch = r["speedup"].get("torch")
    verdict = "holds" if slowest[0] >= BAR and (torch is None or torch > 1) else "is missed"
    beside = "" if torch is None else f", {torch:.2f}x PyTorch's"
    return (
        f"{r['method']}, {r['kind']} heads at {LENGTH} tokens and density {r['density']:.3f}: {slowest[0]:.2f}x the best "
        f"dense attention in XLA ({slowest[1]}){beside}; the bar of {BAR:g}x and above PyTorch {verdict}."
    )


def _planning(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The share of planning in the time of a call, part by part."""
    phase = {(r["kind"], r["length"], r["setting"]): r["seconds"] for r in found if r["method"].endswith("/phases")}
    shares = {
        f"{kind} at {length}": float(np.median(np.divide(seconds, phase[kind, length, "lists"])))
        for (kind, length, setting), seconds in phase.items()
        if setting == "sort"
    }
    listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    claim = (
        "Guide, scores and sort take this share of a call at the first density (paper: below 10 % of the time gained)"
    )
    return [f"{claim}: {listed}."] if shares else []


def measure(part: str, options: Options) -> dict[str, Any]:
    """{minutes, rows of the benchmark} of a part; all densities are for mixed heads up to the bar's length alone."""
    kind, length = part.split(":")
    if kind != "mixed" or int(length) > LENGTH:
        options = dataclasses.replace(options, densities=options.densities[:1])
    start, rows = time.monotonic(), results(int(length), kind, options)
    return {"minutes": (time.monotonic() - start) / 60, "rows": rows}


def main(argv: Sequence[str]) -> None:
    """Measures and writes the card `sparse_attention`."""
    del argv
    f = flags.FLAGS
    if jax.default_backend() == "cpu":
        cpu_ffi.build()
    options = Options(rounds=f.rounds, densities=tuple(map(float, f.densities)))
    stages = Stages(f.work, {"options": dataclasses.asdict(options), "jax": jax.__version__}, overwrite=f.overwrite)
    parts = [stages.run(part, lambda part=part: measure(part, options)) for part in f.parts]
    found = [row for part in parts for row in part["rows"]]
    heads = SHAPES[options.shape].query_heads
    card = Card(
        name="sparse_attention",
        paper=PAPER,
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=sum(part["minutes"] for part in parts),
        seeds=sorted({row["length"] for row in found}),
        rows=[row for part in parts for row in rows_of(part["rows"], heads)],
        departures=departures(found),
    )
    card.write(f.out)


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("parts", PARTS, "kind:tokens of the inputs; the tokens are their seed too.")
    flags.DEFINE_list(
        "densities",
        ["0.16", "1"],
        "Targets; 1 is threshold 0. Other kinds than mixed: the first.",
    )
    flags.DEFINE_integer("rounds", 5, "Rounds of the medians.", lower_bound=1)
    flags.DEFINE_string("work", "runs/sparse_attention", "Folder of what is done.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")
    flags.DEFINE_boolean("overwrite", False, "Discard what a run with other settings left in --work.")


if __name__ == "__main__":
    define_flags()
    launch(main)
