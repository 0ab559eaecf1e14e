"""Rows of the card of `experiments.s2o` from its recorded pieces."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import s2o_language as language
from experiments import s2o_recall as recall
from experiments.cards import Card, Row
from experiments.s2o_operator import density_at, error_at, geometric, interval
from jaxcomp.attention.heads import KINDS

OURS = "s2o + sub-means"
PAPER = {"error": 3.82, "density": 3.31}  # PBS over S2O
PAPER_NOTE = "Published ratios: Llama-3.1-8B at 128K tokens on a GPU; ours: structured heads at 8K"
VALUES_NOTE = "BLASST computes every score: its density is the share of values that it reads"
REPEATS_NOTE = "Ends of recall are the least and the greatest of the repeats or seeds"


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
        setting = mean_setting(config)
        out += _rows(setting, labels[measure], mean)
        for ours in ("s2o", OURS):
            over = {
                n: [a and b and a / b for a, b in zip(mean[n], mean[ours], strict=True)] for n in names if n != ours
            }
            paper = {"PBS-Attn": PAPER[measure]} if ours == "s2o" else {}
            out += _rows(setting, f"{labels[measure]} / that of {ours}", over, paper)
    return out


def mean_setting(config: ConfigDict) -> str:
    """Name of the setting that all kinds make up."""
    return f"mean head (geometric mean of {len(KINDS)} kinds), {config.length} tokens"


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
        for setting, kinds in [("mean head", tuple(KINDS)), *((f"{kind} head", (kind,)) for kind in KINDS)]:
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
        setting = needle_setting(config, length)
        for name in runs[0]:
            found = np.array([run[name]["recall"] for run in runs])  # [seeds, depths]
            density = float(np.mean([run[name]["density"] for run in runs]))
            worst = found[:, found.mean(0).argmin()]
            for metric, shares in (("recall", found), ("recall at the worst depth", worst)):
                ends = float(shares.mean()), float(shares.min()), float(shares.max())
                out.append(Row(name, setting, metric, "", *ends, note=REPEATS_NOTE))
            out.append(Row(name, setting, "density", "", *[density] * 3))
    return out


def needle_setting(config: ConfigDict, length: int) -> str:
    """Name of the setting of a length."""
    return f"needle, {length} tokens, {len(config.needle.depths)} depths, {config.needle.asking} asking queries"


def recall_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Recall per question at about one density, what of dense recall is left, the least density that keeps nearly all of it."""
    settings, out = config.recall, []
    for length in settings.lengths:
        found = {
            name.partition("/")[2]: [recall.Recalled(*run) for run in piece["result"]]
            for name, piece in pieces.items()
            if name.startswith(f"{length}/")
        }
        (dense,) = found[language.DENSE]
        setting = recall_setting(length)
        for name, runs in found.items():
            near = recall.nearest(runs, settings.density)
            for question, shares in near.recall.items():
                low, high = min(shares), max(shares)
                mean = float(np.clip(np.mean(shares), low, high))  # of equal shares it may lie beside them
                out.append(Row(name, setting, f"recall, {question}", "", mean, low, high, note=REPEATS_NOTE))
            out.append(Row(name, setting, "density", "", *[near.density] * 3))
            out.append(Row(name, setting, "least share of dense recall", "", *[recall.kept(near, dense)] * 3))
            if (least := recall.least_density(runs, dense, settings.share)) is not None:
                out.append(Row(name, setting, f"least density that keeps {settings.share:.0%}", "", *[least] * 3))
    return out


def recall_setting(length: int) -> str:
    """Name of the setting of a length."""
    return f"decoder that copies, {length} tokens of held-out text with passages"


def text_rows(config: ConfigDict, pieces: Mapping[str, Any]) -> list[Row]:
    """Density within 1 % of the dense perplexity, the run nearest to density 0.3, composition."""
    settings, results = config.language, {name: piece["result"] for name, piece in pieces.items()}
    base = language.Scored(*results.pop(language.DENSE)[0])
    table = results.pop("composition")
    setting = text_setting(config)
    percent = f"{settings.ratio - 1:.0%}"
    out = [Row(language.DENSE, setting, "perplexity", "", *[float(np.exp(np.mean(base.nats)))] * 3)]
    for name, runs in results.items():
        scored = [language.Scored(*run) for run in runs]
        near = min(scored, key=lambda s: abs(np.log(s.density / 0.3)))
        out.append(Row(name, setting, "perplexity ratio nearest to density 0.3", "", *_ratio(near, base)))
        out.append(Row(name, setting, "that run's density", "", *[near.density] * 3))
        if (found := language.density_interval(scored, base, settings.ratio)) is not None:
            out.append(Row(name, setting, f"density at perplexity + {percent}", "", *found))
    whole = language.Scored(*table[f"FP32/16/{language.DENSE}"])
    for cell, scored in table.items():
        weights, bits, attention = cell.split("/")
        scored, where = language.Scored(*scored), f"composition, q, k and v at {bits} bits"
        method = f"{weights} weights, {attention}"
        out.append(Row(method, where, "perplexity ratio to dense FP32", "", *_ratio(scored, whole)))
        out.append(Row(method, where, "density", "", *[scored.density] * 3))
    return out


def text_setting(config: ConfigDict) -> str:
    """Name of the setting of perplexities."""
    return f"decoder of 1.3 M parameters, {config.language.context} tokens of held-out text"


def _ratio(scored: language.Scored, base: language.Scored) -> list[float]:
    value, low, high = language.ratios(scored, base)
    return [value, min(low, value), max(high, value)]


def speed_rows(path: pathlib.Path) -> list[Row]:
    """Speedups as the kernels' own benchmark recorded them; none where it has not been run."""
    if not path.is_file():
        return []
    rows = Card.from_json(path.read_text(encoding="utf-8")).rows
    return [row for row in rows if row.metric.startswith("speedup")]
