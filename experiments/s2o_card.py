"""The result card of `experiments.s2o`: its rows, each bar with the verdict, and every comparison that S2O loses."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.cards import Card, Row, current_commit
from experiments.s2o_operator import density_at, error_at, geometric
from experiments.s2o_rows import (
    OURS,
    ablation_rows,
    head_rows,
    mean_setting,
    needle_rows,
    needle_setting,
    recall_rows,
    recall_setting,
    speed_rows,
    text_rows,
    text_setting,
)
from jaxcomp.attention.heads import KINDS

SPEEDS = "sparse_attention.json"
ROWS = {
    "heads": head_rows,
    "ablations": ablation_rows,
    "needles": needle_rows,
    "recall": recall_rows,
    "language": text_rows,
}
Key = tuple[str, str, str]  # setting, method, metric


class Bar(NamedTuple):
    """A number that must not fall below `least`, or not exceed it where `below`."""

    claim: str
    key: Key
    least: float
    below: bool = False

    def verdict(self, row: Row) -> str:
        """The claim, what was found with its interval, met or not."""
        holds = lambda x: x <= self.least if self.below else x >= self.least
        met = "met" if holds(row.value) else "not met"
        if row.low != row.high and holds(row.low) != holds(row.high):
            met += ", but the interval reaches the other side"
        interval = f" [{row.low:.3g}, {row.high:.3g}]" if row.low != row.high else ""
        return f"Bar: {self.claim} {'<=' if self.below else '>='} {self.least:g}: {row.value:.3g}{interval}: {met}."


def card(config: ConfigDict, results: Mapping[str, Any], device: str, folder: pathlib.Path) -> Card:
    """Everything that was run, the kernels' speed from their own card, and what follows from the numbers."""
    rows = [row for part, make in ROWS.items() if part in results for row in make(config, results[part])]
    rows += speed_rows(folder / SPEEDS)
    seconds = sum(piece["cpu_seconds"] for part in results.values() for piece in part.values())
    found = {(row.setting, row.method, row.metric): row for row in rows}
    heads, ablations = results.get("heads", {}), results.get("ablations", {})
    texts = [bar.verdict(found[bar.key]) for bar in bars(config) if bar.key in found]
    return Card(
        name="s2o",
        paper="S2O (arXiv 2602.22575), with the baselines that it is compared with",
        command="python -m experiments.s2o",
        commit=current_commit(),
        device=device,
        minutes=seconds / 60,
        seeds=list(config.seeds),
        rows=rows,
        departures=[
            *texts,
            *lost(config, heads, ablations),
            *unreached(config, heads),
            *departures(),
            *missing(results),
        ],
    )


def bars(config: ConfigDict) -> Iterator[Bar]:
    """What was promised of S2O with mean scores and with sub-means."""
    labels = {"error": f"MSE at density {config.density:g}", "density": f"density at MSE {config.error:g}"}
    for ours in ("s2o", OURS):
        for measure, peers in config.least.items():
            for peer, least in peers.items():
                key = mean_setting(config), peer, f"{labels[measure]} / that of {ours}"
                yield Bar(f"mean head, {labels[measure]} of {peer} over that of {ours}", key, least)
    percent = f"{config.language.ratio - 1:.0%}"
    for name, below in (("s2o", True), (OURS, True), ("XAttention", False)):
        key = text_setting(config), name, f"density at perplexity + {percent}"
        yield Bar(f"decoder, density at which the perplexity of {name} is within {percent}", key, 0.3, below)
    for length in config.needle.lengths:
        for ours in ("s2o", OURS):
            key = needle_setting(config, length), ours, "recall at the worst depth"
            yield Bar(f"needle at {length} tokens, recall of {ours} at the worst depth", key, 1.0)
    for length in config.recall.lengths:
        for ours in ("s2o", OURS, *config.fine(config.recall.block, config.recall.segment)):
            claim = (
                f"decoder that copies at {length} tokens, share of dense recall that {ours} keeps at the worst depth"
            )
            yield Bar(claim, (recall_setting(length), ours, "least share of dense recall"), config.recall.share)
    for kind in ("mixed", "vertical", "topic", "stripe"):
        for peer, least in (("chunked/256", 3.0), ("chunked/1024", 3.0), ("torch", 1.0)):
            key = f"{kind} heads, 16384 tokens", "cpu_ffi, target density 0.16", f"speedup over {peer}"
            yield Bar(f"CPU, {kind} heads at 16384 tokens and density 0.16, speedup over {peer}", key, least)


def departures() -> list[str]:
    """Where and why we differ from the papers."""
    return [
        "Heads are synthetic (jaxcomp.attention.heads) and 8K tokens long: ratios, not values, are compared with the paper's.",
        "The paper's guide vector, stop schedule and segment length were not available; ours are in the docstring of "
        "jaxcomp.attention.s2o.",
        "Tiles and blocks have 64 rows and keys for every method (the papers: 128), PBS segments 256 keys, AnchorAttention "
        "groups 4 blocks instead of 16, FlexPrefill at least 2 blocks: short sequences leave no room for the published sizes.",
        "The paper's 7.51x over FlashAttention-2 and 3.81x of the whole prefill (128K tokens of Llama-3.1-8B on a GPU) are not "
        "repeated: no GPU was at hand; speedups are those of CPU kernels over dense attention of the same CPU.",
        "Every row of a passage that is copied reads a key of its own, so a mean over rows dilutes all of them: sub-means of two "
        "rows multiply half of the queries with the keys to rank them, those of single rows all.",
        "RULER, InfiniteBench and LongBench need models and data that are not here; needles and small decoders stand in.",
    ]


def missing(results: Mapping[str, Any]) -> list[str]:
    """The parts of the experiment that a card lacks."""
    absent = [part for part in ROWS if part not in results]
    return [f"Parts of the experiment that are not measured here: {', '.join(absent)}."] if absent else []


def lost(config: ConfigDict, heads: Mapping[str, Any], ablations: Mapping[str, Any]) -> list[str]:
    """Every kind on which S2O loses to a published method, and which variants win it back on the seeds of the ablations."""
    if not heads:
        return []
    names = list(next(iter(heads.values()))["result"])
    rivals = [name for name in names if not name.startswith(("s2o", "oracle"))]
    out = []
    for kind in KINDS:
        errors = _errors(config, heads, kind, config.seeds)
        for ours in ("s2o", OURS):
            peers = {
                n: errors[n] for n in rivals if errors[n] is not None and errors[ours] and errors[n] < errors[ours]
            }
            if peers:
                beaten = ", ".join(f"{name} ({error:.2g})" for name, error in peers.items())
                text = f"{kind} head: {ours} ({errors[ours]:.2g}) loses to {beaten} at density {config.density:g}"
                out.append(text + _mends(config, heads, ablations, kind, rivals))
    return out


def _mends(
    config: ConfigDict, heads: Mapping[str, Any], ablations: Mapping[str, Any], kind: str, rivals: list[str]
) -> str:
    if not ablations:
        return "."
    errors = _errors(config, heads, kind, config.ablation_seeds)
    best = min(errors[n] for n in rivals if errors[n] is not None)
    variants = _errors(config, ablations, kind, config.ablation_seeds) | {OURS: errors[OURS]}
    mends = sorted((error, name) for name, error in variants.items() if error is not None and error < best)
    listed = ", ".join(f"{name} ({error:.2g})" for error, name in mends) or "none of the variants"
    return f"; below the best of them ({best:.2g}) on the seeds of the ablations: {listed}."


def _errors(config: ConfigDict, pieces: Mapping[str, Any], kind: str, seeds: Any) -> dict[str, float | None]:
    results = [pieces[f"{kind}/{seed}"]["result"] for seed in seeds]
    return {name: geometric([error_at(result[name], config.density) for result in results]) for name in results[0]}


def unreached(config: ConfigDict, pieces: Mapping[str, Any]) -> list[str]:
    """Methods without a row in a comparison of heads, and what their thresholds covered instead."""
    out = []
    for name in next(iter(pieces.values()))["result"] if pieces else ():
        curves = {head: piece["result"][name] for head, piece in pieces.items()}
        for label, of, level, column in (
            (f"density {config.density:g}", error_at, config.density, 2),
            (f"MSE {config.error:g}", density_at, config.error, 3),
        ):
            missed = [curve for curve in curves.values() if of(curve, level) is None]
            if missed:
                low, high = (edge(point[column] for curve in missed for point in curve) for edge in (min, max))
                ran = f"where it ran from {low:.2g} to {high:.2g}"
                out.append(f"{name} does not reach {label} on {len(missed)} of {len(curves)} heads, {ran}.")
    return out
