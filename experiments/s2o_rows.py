"""The result card of `experiments.s2o` from its recorded pieces."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import s2o_language as language
from experiments.cards import Card, Row, current_commit
from experiments.s2o_operator import density_at, error_at, geometric, interval
from jaxcomp.attention.heads import KINDS

OURS = "s2o + sub-means"
PAPER = {"error": 3.82, "density": 3.31}  # PBS over S2O
PAPER_NOTE = "Published ratios: Llama-3.1-8B at 128K tokens on a GPU; ours: structured heads at 8K"
VALUES_NOTE = "BLASST computes every score: its density is the share of values that it reads"
SPEEDS = "sparse_attention.json"


def card(config: ConfigDict, results: Mapping[str, Any], device: str, folder: pathlib.Path) -> Card:
    """Everything that was run, the kernels' speed from their own card, and what follows from the numbers."""
    rows = []
    for part, make in {
        "heads": head_rows,
        "ablations": ablation_rows,
        "needles": needle_rows,
        "language": text_rows,
    }.items():
        rows += make(config, results[part]) if part in results else []
    rows += speed_rows(folder / SPEEDS)
    seconds = sum(piece["cpu_seconds"] for part in results.values() for piece in part.values())
    return Card(
        name="s2o",
        paper="S2O (arXiv 2602.22575), with the baselines that it is compared with",
        command="python -m experiments.s2o",
        commit=current_commit(),
        device=device,
        minutes=seconds / 60,
        seeds=list(config.seeds),
        rows=rows,
        departures=departures(config, rows) + unreached(config, results.get("heads", {})),
    )


def head_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Error at one density and density at one error: per kind, their mean, and the ratios to S2O."""
    names = list(next(iter(pieces.values()))["result"])
    measures = {"error": (error_at, config.density), "density": (density_at, config.error)}
    labels = {"error": f"MSE at density {config.density:g}", "density": f"density at MSE {config.error:g}"}
    out = []
    for measure, (of, level) in measures.items():
        values = {  # method -> kind -> one per seed
            name: {kind: [of(pieces[f"{kind}/{s}"]["result"][name], level) for s in config.seeds] for kind in KINDS}
            for name in names
        }
        mean = {
            n: [geometric([v[kind][i] for kind in KINDS]) for i in range(len(config.seeds))] for n, v in values.items()
        }
        for kind in KINDS:
            out += _rows(f"{kind} head, {config.length} tokens", labels[measure], {n: values[n][kind] for n in names})
        setting = f"mean head (geometric mean of {len(KINDS)} kinds), {config.length} tokens"
        out += _rows(setting, labels[measure], mean)
        for ours in ("s2o", OURS):
            over = {
                n: [a and b and a / b for a, b in zip(mean[n], mean[ours], strict=True)] for n in names if n != ours
            }
            paper = {"PBS-Attn": PAPER[measure]} if ours == "s2o" else {}
            out += _rows(setting, f"{labels[measure]} / that of {ours}", over, paper)
    return out


def _rows(
    setting: str, metric: str, values: Mapping[str, Sequence[float | None]], paper: Mapping[str, float] | None = None
) -> list[Row]:
    """A row per method that was measured at every seed."""
    found = {name: interval(list(seeds)) for name, seeds in values.items()}
    published = paper or {}
    notes = {"BLASST": VALUES_NOTE} | dict.fromkeys(published, PAPER_NOTE)
    return [
        Row(name, setting, metric, "", *ends, published.get(name), notes.get(name, ""))
        for name, ends in found.items()
        if ends is not None
    ]


def ablation_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Variants of S2O on the mean head, and on the kinds that single ideas are for."""
    names = list(next(iter(pieces.values()))["result"])
    out = []
    for label, of, level in (
        (f"MSE at density {config.density:g}", error_at, config.density),
        (f"density at MSE {config.error:g}", density_at, config.error),
    ):
        for setting, kinds in {"mean head": tuple(KINDS)} | {f"{kind} head": (kind,) for kind in KINDS}.items():
            values = {
                n: [
                    geometric([of(pieces[f"{kind}/{s}"]["result"][n], level) for kind in kinds])
                    for s in config.ablation_seeds
                ]
                for n in names
            }
            out += _rows(f"one change to s2o, {setting}, {config.length} tokens", label, values)
    local = [pieces[f"{kind}/{s}"]["result"]["local window only"][0] for kind in KINDS for s in config.ablation_seeds]
    for label, column in (("MSE", 3), ("density", 1)):
        ends = interval([p[column] for p in local])
        out.append(Row("local window only", f"no history, {config.length} tokens", label, "", *ends))
    return out


def needle_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Recall over depths and seeds, its worst depth, and the density that it cost."""
    out = []
    for length in config.needle.lengths:
        runs = [pieces[f"{length}/{s}"]["result"] for s in config.ablation_seeds]
        setting = f"needle, {length} tokens, {len(config.needle.depths)} depths, {config.needle.asking} asking queries"
        for name in runs[0]:
            recall = np.array([run[name]["recall"] for run in runs])  # [seeds, depths]
            density = float(np.mean([run[name]["density"] for run in runs]))
            worst = float(recall.mean(0).min())
            out.append(Row(name, setting, "recall", "", float(recall.mean()), float(recall.min()), float(recall.max())))
            out.append(Row(name, setting, "recall at the worst depth", "", worst, worst, worst))
            out.append(Row(name, setting, "density", "", *[density] * 3))
    return out


def text_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Density within 1 % of the dense perplexity, the run nearest to it, recall per depth, composition."""
    settings, results = config.language, {name: piece["result"] for name, piece in pieces.items()}
    base = language.Scored(*results.pop(language.DENSE)[0])
    recall, table = results.pop("recall"), results.pop("composition")
    setting = f"decoder of 1.3 M parameters, {settings.context} tokens of held-out text"
    percent = f"{settings.ratio - 1:.0%}"
    out = [Row(language.DENSE, setting, "perplexity", "", *[float(np.exp(np.mean(base.nats)))] * 3)]
    for name, runs in results.items():
        scored = [language.Scored(*run) for run in runs]
        near = min(scored, key=lambda s: abs(np.log(s.density / 0.3)))
        out.append(Row(name, setting, "perplexity ratio nearest to density 0.3", "", *_ratio(near, base)))
        out.append(Row(name, setting, "that run's density", "", *[near.density] * 3))
        if (found := language.density_within(scored, base, settings.ratio)) is not None:
            out.append(Row(name, setting, f"density at perplexity + {percent}", "", *[found] * 3))
    for name, depths in recall.items():
        for depth, value in zip(settings.recall.depths, depths, strict=True):
            out.append(Row(name, "decoder, passage repeated at the end", f"recall, depth {depth:g}", "", *[value] * 3))
    whole = language.Scored(*table[f"FP32/16/{language.DENSE}"])
    for cell, scored in table.items():
        weights, bits, attention = cell.split("/")
        scored, where = language.Scored(*scored), f"composition, q, k and v at {bits} bits"
        method = f"{weights} weights, {attention}"
        out.append(Row(method, where, "perplexity ratio to dense FP32", "", *_ratio(scored, whole)))
        out.append(Row(method, where, "density", "", *[scored.density] * 3))
    return out


def _ratio(scored: language.Scored, base: language.Scored) -> list[float]:
    value, low, high = language.ratios(scored, base)
    return [value, min(low, value), max(high, value)]


def speed_rows(path: pathlib.Path) -> list[Row]:
    """Speedups as the kernels' own benchmark recorded them; none where it has not been run."""
    if not path.is_file():
        return []
    rows = Card.from_json(path.read_text(encoding="utf-8")).rows
    return [row for row in rows if row.metric == "speedup"]


def departures(config: ConfigDict, rows: Sequence[Row]) -> list[str]:
    """Where and why we differ, then every comparison that S2O loses, from the numbers."""
    label = f"MSE at density {config.density:g}"
    table = {(row.setting, row.method): row.value for row in rows if row.metric == label}
    out = [
        "Heads are synthetic (jaxcomp.attention.heads) and 8K tokens long: ratios, not values, are compared with the paper's.",
        "The paper's guide vector, stop schedule and segment length were not available; ours are in the docstring of "
        "jaxcomp.attention.s2o.",
        "Tiles and blocks have 64 rows and keys for every method (the papers: 128), PBS segments 256 keys, AnchorAttention "
        "groups 4 blocks instead of 16, FlexPrefill at least 2 blocks: short sequences leave no room for the published sizes.",
        "RULER, InfiniteBench and LongBench need models and data that are not here; needles and a small decoder stand in.",
    ]
    for setting in dict.fromkeys(setting for setting, _ in table):
        for ours in ("s2o", OURS):
            mine = table.get((setting, ours))
            peers = {m: v for (s, m), v in table.items() if s == setting and not m.startswith(("s2o", "oracle"))}
            lost = [f"{m} ({v:.2g})" for m, v in peers.items() if mine is not None and v < mine]
            if lost and (setting, "PBS-Attn") in table:
                out.append(f"{setting}: {ours} ({mine:.2g}) loses to {', '.join(lost)} at density {config.density:g}.")
    return out


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


def bars(card_path: pathlib.Path) -> dict[str, float]:
    """The ratios of the mean head by (peer, metric), for tests and the README."""
    rows = json.loads(card_path.read_text(encoding="utf-8"))["rows"]
    return {f"{r['method']}, {r['metric']}": r["value"] for r in rows if r["setting"].startswith("mean head (")}
