"""Language model quantization baselines side by side; writes a result card.

    python -m experiments.lm_baselines [--config=configs/lm/baselines.py] [--out=runs/lm_baselines]

Every run (model, seed, scheme, method) is recorded in `--out` when it is done; a killed experiment goes on from there.
"""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import configs.lm
from experiments import lm as experiment
from experiments.cards import Card, Row, current_commit, current_device
from experiments.lm import LanguageModel, Text
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.report import report
from jaxcomp.core.transform import compress

COMMAND = "python -m experiments.lm_baselines"
FP = "FP32"
TEXTS = {"embedded": "embedded text", "wikitext2": "WikiText-2"}
PLAIN, OUTLIERS = "plain model", "outliers injected"
PAPER_NOTE = (
    "Published ratios: LLaMA-2-7B, WikiText-2 at 2048 tokens, perplexity over that of FP16: SmoothQuant W8A8 from its "
    "repository, all others from the tables of ABQ-LLM (arXiv 2408.08554)"
)
PAPER = {  # perplexity / FP16 perplexity
    ("W8A8", "SmoothQuant"): 5.515 / 5.474,
    ("W6A6", "SmoothQuant"): 6.20 / 5.47,
    ("W4A4", "SmoothQuant"): 83.12 / 5.47,
    ("W4A16", "GPTQ"): 5.83 / 5.47,
    ("W4A16", "AWQ"): 6.15 / 5.47,
    ("W3A16", "GPTQ"): 8.37 / 5.47,
    ("W3A16", "AWQ"): 24.00 / 5.47,
    ("W2A16", "GPTQ"): 7.7e3 / 5.47,
}
CLAIMS = (  # (model, better, worse, schemes): the better method has the lower perplexity
    (PLAIN, "GPTQ", "RTN", ("W4A16", "W3A16", "W2A16", "W3A16 g64", "W2A16 g64")),
    (PLAIN, "AWQ", "RTN", ("W4A16", "W3A16", "W3A16 g64")),
    (OUTLIERS, "SmoothQuant", "RTN", ("W8A8", "W6A6", "W4A4")),
    (OUTLIERS, "SmoothQuant + GPTQ", "SmoothQuant", ("W6A6", "W4A4")),
)
Results = dict[tuple[str, str, str], list[dict[str, Any]]]  # (model, scheme, method) -> one record per seed


def run_all(config: ConfigDict, stages: Stages) -> Results:
    """All runs, recorded one by one."""
    texts = {name: experiment.read_texts(name) for name in text_names()}
    results: Results = {}
    for model, channels in ((PLAIN, 0), (OUTLIERS, config.outlier_channels)):
        lm = experiment.load_model(None, ConfigDict(config.to_dict() | {"outlier_channels": channels}))
        for seed in config.seeds:
            seeded = ConfigDict(config.to_dict() | {"seed": seed})
            windows = {name: experiment.load_text(lm, seeded, text) for name, text in texts.items()}
            calibration = experiment.calibration(lm, seeded, windows["embedded"])
            for scheme, method, transform in planned(config, lm, first=seed == config.seeds[0]):
                work = lambda: one_run(lm, seeded, windows, transform, calibration)  # noqa: B023 (called at once)
                record = stages.run(f"{model}, seed {seed}, {scheme}, {method}", work)
                results.setdefault((model, scheme, method), []).append(record)
    return results


def text_names() -> tuple[str, ...]:
    """The texts that can be scored here."""
    return ("embedded", "wikitext2") if "JAXCOMP_DATA" in os.environ else ("embedded",)


def planned(config: ConfigDict, lm: LanguageModel, first: bool) -> list[tuple[str, str, Any]]:
    """(scheme, method, transform) of one seed; what needs no data runs for the first seed only."""
    plan = [("", FP, None)] if first else []
    for scheme, options in config.schemes.items():
        for method, transform in config.methods(lm.config, options.to_dict()).items():
            if first or method not in config.data_free:
                plan.append((scheme, method, transform))
    return plan


def one_run(
    lm: LanguageModel, config: ConfigDict, windows: Mapping[str, Text], transform: Any, calibration: Any
) -> dict[str, Any]:
    """Compresses and scores; JSON-able."""
    params, seconds, started = lm.params, 0.0, time.monotonic()
    if transform is not None:
        params, _, seconds = compress(transform, params, calibration)
    bits = report(lm.params, params).bits_per_weight if transform is not None else 32.0
    nll = {name: experiment.score(lm, params, config, text).nll for name, text in windows.items()}
    per_token = {name: (v / (windows[name].evaluation.shape[1] - 1)).round(7).tolist() for name, v in nll.items()}
    elapsed = time.monotonic() - started
    return {"nats": per_token, "bits_per_weight": bits, "bytes": nbytes(params), "seconds": seconds, "elapsed": elapsed}


def interval(records: list[dict[str, Any]], base: dict[str, Any] | None, text: str, draws: int = 2000) -> list[float]:
    """[value, low, high] of the perplexity, or of its ratio to a base; each bootstrap draws a seed, and windows."""
    nats = np.array([record["nats"][text] for record in records])  # [seeds, windows], per token
    if base is not None:
        nats = nats - np.array(base["nats"][text])
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(nats), size=(draws, 1))
    windows = rng.integers(nats.shape[1], size=(draws, nats.shape[1]))
    low, high = np.quantile(np.exp(nats[seeds, windows].mean(1)), [0.025, 0.975])
    value = float(np.exp(nats.mean()))
    return [value, min(float(low), value), max(float(high), value)]


def rows(results: Results) -> list[Row]:
    """The card's rows: one table per model and scheme, full precision first."""
    out = []
    for model, scheme in dict.fromkeys((model, scheme) for model, scheme, _ in results if scheme):
        base = results[model, "", FP]
        chosen = {FP: base} | {method: r for (m, s, method), r in results.items() if (m, s) == (model, scheme)}
        for method, records in chosen.items():
            out += method_rows(f"{scheme}, {model}", method, records, base[0], PAPER.get((scheme, method)))
    return out


def method_rows(
    setting: str, method: str, records: list[dict[str, Any]], base: dict[str, Any], paper: float | None
) -> list[Row]:
    """Perplexity and ratio per text, bits and bytes, seconds."""
    out = []
    for text in records[0]["nats"]:
        out.append(Row(method, setting, f"perplexity, {TEXTS[text]}", "", *interval(records, None, text)))
        published = paper if text == "wikitext2" and setting.endswith(PLAIN) else None
        note = PAPER_NOTE if published else ""
        out.append(
            Row(method, setting, f"ratio to {FP}, {TEXTS[text]}", "", *interval(records, base, text), published, note)
        )
    exact = {("bits per weight", "bit"): "bits_per_weight", ("whole model", "B"): "bytes"}
    for (metric, unit), key in exact.items():
        out.append(Row(method, setting, metric, unit, *[records[0][key]] * 3))
    seconds = [record["seconds"] for record in records]
    out.append(Row(method, setting, "compression", "s", float(np.median(seconds)), min(seconds), max(seconds)))
    return out


def claims(results: Results) -> list[str]:
    """Which published orders hold here, from the numbers."""
    out = []
    for model, better, worse, schemes in CLAIMS:
        held = {True: [], False: []}
        for scheme in (s for s in schemes if (model, s, better) in results):
            a, b = (interval(results[model, scheme, m], None, "embedded")[0] for m in (better, worse))
            held[a < b].append(f"{scheme} ({a:.2f} against {b:.2f})")
        verdicts = [f"{verb} at {', '.join(held[k])}" for k, verb in ((True, "holds"), (False, "fails")) if held[k]]
        if verdicts:
            out.append(f"{better} below {worse}, {model}, embedded text: {'; '.join(verdicts)}.")
    return out


def card(config: ConfigDict, results: Results) -> Card:
    """The result card."""
    departures = [
        "The model is the embedded decoder of 1.3 M parameters, not LLaMA-2-7B; ratios to full precision are compared, and "
        "only their order can be expected to agree.",
        f"{config.calibration_windows} calibration windows of {config.context} tokens; the papers use 128 of 2048.",
        "WikiText-2 is far from the text that the model was trained on; its perplexities are high for every method.",
        "Embedding and head stay in full precision, as in the papers, and weigh more here: see the whole model's bytes.",
        *claims(results),
    ]
    return Card(
        name="lm_baselines",
        paper="GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438), round to nearest",
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=sum(record["elapsed"] for records in results.values() for record in records) / 60,
        seeds=list(config.seeds),
        rows=rows(results),
        departures=departures,
    )


def main(argv) -> None:
    """Runs what is missing and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, f = flags.FLAGS.config, flags.FLAGS
    facts = {"methods": experiment.source_digest(config.methods), "jax": jax.__version__}
    facts |= {"texts": text_names(), "model_files": experiment.fingerprint(None)}
    stages = Stages(f.out, config.to_dict() | facts, overwrite=f.overwrite)
    results = run_all(config, stages)
    card(config, results).write(f.results)
    print(f"{f.results}/lm_baselines.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.lm.__file__).parent / "baselines.py", "runs/lm_baselines")
    launch(main)
