"""S2O against every baseline: structured heads, ablations, needles, decoders that read or recall; writes a card and heat maps.

    python -m experiments.s2o [--config=configs/attention/s2o.py] [--out=runs/s2o] [--parts=heads,needles]

Every finished piece is recorded in `--out`; a killed experiment goes on from there.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import configs.attention
from experiments import lm as experiment
from experiments import s2o_language as language
from experiments import s2o_operator as operator
from experiments import s2o_pictures as pictures
from experiments import s2o_recall as recall
from experiments import s2o_retrieval as retrieval
from experiments.cards import current_device
from experiments.runs import define_card_flags, launch
from experiments.s2o_card import card
from experiments.stages import Stages
from jaxcomp.attention.baselines import dense
from jaxcomp.attention.heads import KINDS

NEEDLE_METHODS = ("s2o", "s2o + sub-means", "PBS-Attn", "XAttention", "MInference", "AnchorAttention")
NEEDLE_VARIANTS = ("segment = tile", "segment = tile, sub-means", "stop by the maximum gain", "local window only")
LANGUAGE_METHODS = ("s2o", "s2o + sub-means", "PBS-Attn", "XAttention", "MeanPool", "MInference", "FlexPrefill")
RECALL_METHODS = (*LANGUAGE_METHODS, "AnchorAttention")
CALIBRATED = ("s2o", "s2o + sub-means", "XAttention", "PBS-Attn")
PICTURED = ("s2o", "XAttention", "PBS-Attn", "MInference")
LOCAL = "local window only"


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """JSON-able result with the CPU seconds that it took."""
    start = time.process_time()
    return {"result": work(), "cpu_seconds": time.process_time() - start}


def heads(config: ConfigDict, stages: Stages) -> dict[str, Any]:
    """Curves of all methods on every kind and seed."""
    methods = config.methods(config.block, config.segment)
    sweep = lambda kind, seed: operator.sweep(methods, kind, config.length, seed)
    return _each_head(stages, "heads", config.seeds, sweep)


def ablations(config: ConfigDict, stages: Stages) -> dict[str, Any]:
    """Curves of the variants of S2O on every kind and fewer seeds."""
    methods = config.ablations(config.block, config.segment)
    sweep = lambda kind, seed: operator.sweep(methods, kind, config.length, seed)
    return _each_head(stages, "ablations", config.ablation_seeds, sweep)


def _each_head(stages: Stages, part: str, seeds: Any, sweep: Callable[[str, int], Any]) -> dict[str, Any]:
    out = {}
    for seed in seeds:
        for kind in KINDS:
            work = lambda kind=kind, seed=seed: sweep(kind, seed)
            out[f"{kind}/{seed}"] = stages.run(f"{part}, {kind}, seed {seed}", lambda work=work: timed(work))
    return out


def needles(config: ConfigDict, stages: Stages) -> dict[str, Any]:
    """Recall at every depth, per length and seed."""
    settings = config.needle
    methods, variants = (made(config.block, config.segment) for made in (config.methods, config.ablations))
    methods = {name: methods[name] for name in NEEDLE_METHODS}
    methods |= {name if name == LOCAL else f"s2o, {name}": variants[name] for name in NEEDLE_VARIANTS}
    methods[language.DENSE] = (lambda _: dense(block=config.block), (0.0,))
    out = {}
    for length in settings.lengths:
        for seed in config.ablation_seeds:
            work = lambda length=length, seed=seed: retrieval.needles(
                methods, length, settings.depths, settings.asking, settings.density, seed
            )
            out[f"{length}/{seed}"] = stages.run(f"needles, {length}, seed {seed}", lambda work=work: timed(work))
    return out


def recalls(config: ConfigDict, stages: Stages) -> dict[str, Any]:
    """Recall and density of the decoder that copies, per length and method."""
    settings = config.recall
    decoder, methods = recall.load(settings.model), config.methods(settings.block, settings.segment)
    compared = {name: methods[name] for name in RECALL_METHODS} | config.fine(settings.block, settings.segment)
    compared[LOCAL] = config.ablations(settings.block, settings.segment)[LOCAL]
    attends = {name: (lambda t, made=made: made(t).attend, tried) for name, (made, tried) in compared.items()}
    attends = {language.DENSE: (lambda _: language.dense_attend, (0.0,))} | attends
    out = {}
    for length in settings.lengths:
        asked = recall.questions(settings, length)
        for name, attend in attends.items():
            work = lambda attend=attend, asked=asked: recall.answers(decoder, *attend, asked)
            out[f"{length}/{name}"] = stages.run(f"recall, {length}, {name}", lambda work=work: timed(work))
    return out


def text(config: ConfigDict, stages: Stages) -> dict[str, Any]:
    """Perplexity curves and the composition table of the long-context decoder."""
    settings = config.language
    lm, windows, calibration = language.load(settings)
    methods = config.methods(settings.block, settings.segment)
    run = lambda name, work: stages.run(f"language, {name}", lambda: timed(work))
    exact = lambda: [language.score(language.scorer(lm, lambda _: language.dense_attend), None, lm.params, windows)]
    out = {language.DENSE: run(language.DENSE, exact)}
    for name in LANGUAGE_METHODS:
        out[name] = run(name, lambda name=name: language.uniform(lm, methods[name], windows))
    for name in CALIBRATED:
        work = lambda name=name: language.per_head(lm, methods[name], windows, calibration, settings.targets)
        out[f"{name}, per head"] = run(f"{name}, per head", work)
    out["composition"] = run("composition", lambda: _composition(config, lm, methods, windows))
    return out


def _composition(config: ConfigDict, lm: Any, methods: Mapping[str, Any], windows: np.ndarray) -> dict[str, Any]:
    settings = config.language
    sparse = methods["s2o + sub-means"][0](jnp.float32(settings.composition_gain)).attend
    out = {}
    for weights, params in language.weights(lm, settings.abq).items():
        for kv_bits in (16, 8, 4):
            for name, attend in ((language.DENSE, language.dense_attend), ("s2o + sub-means", sparse)):
                out[f"{weights}/{kv_bits}/{name}"] = language.composed(lm, params, attend, kv_bits, windows[::2])
    return out


def _described(config: ConfigDict, methods: Callable[[int, int], Mapping[str, operator.Method]]) -> dict[str, Any]:
    """What the curves of a function of the config depend on."""
    thresholds = {name: list(tried) for name, (_, tried) in methods(config.block, config.segment).items()}
    return {"source": experiment.source_digest(methods), "thresholds": thresholds}


def _trained(folder: str, part: str) -> str:
    """The folder of a part's decoder. Raises FileNotFoundError where there is none."""
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {DECODERS[part]} makes it, or leave {part} out of --parts")
    return folder


def identity(config: ConfigDict, part: str) -> dict[str, Any]:
    """All that the results of a part depend on: a change of another part's settings leaves them valid."""
    settings, made = DEPENDS[part]
    own = {name: config.to_dict()[name] for name in ("block", "segment", *settings)}
    if part in DECODERS:
        own["decoder"] = experiment.fingerprint(_trained(config[part].model, part))
    return own | {name: _described(config, config[name]) for name in made} | {"jax": jax.__version__}


DECODERS = {"language": "experiments.extend_lm", "recall": "experiments.train_recall"}  # part: what trains its model
DEPENDS = {  # part: settings, functions that make methods
    "heads": (("length", "seeds"), ("methods",)),
    "ablations": (("length", "ablation_seeds"), ("ablations",)),
    "needles": (("needle", "ablation_seeds"), ("methods", "ablations")),
    "recall": (("recall",), ("methods", "ablations", "fine")),
    "language": (("language",), ("methods",)),
}
PARTS = {"heads": heads, "ablations": ablations, "needles": needles, "recall": recalls, "language": text}


def main(argv) -> None:
    """Runs what is missing and writes the card, the heat maps and the report."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, f = flags.FLAGS.config, flags.FLAGS
    if unknown := sorted(set(f.parts) - set(PARTS)):
        raise ValueError(f"--parts: {unknown[0]!r} is unknown; expected some of {', '.join(PARTS)}")
    stages = {part: Stages(f"{f.out}/{part}", identity(config, part), overwrite=f.overwrite) for part in f.parts}
    results = {part: PARTS[part](config, stages[part]) for part in f.parts}
    folder = pathlib.Path(f.results)
    written = card(config, results, current_device(), folder)
    written.write(folder)
    methods = config.methods(16, 32)
    pictures.draw({name: methods[name] for name in PICTURED}, folder / "s2o_heads.png")
    pictures.report(written.to_markdown(), folder / "s2o_heads.png", pathlib.Path(f.out) / "report.html")
    print(f"{folder}/s2o.md, {folder}/s2o_heads.png, {f.out}/report.html")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.attention.__file__).parent / "s2o.py", "runs/s2o")
    flags.DEFINE_list("parts", list(PARTS), "What to run.")
    launch(main)
