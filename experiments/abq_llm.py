"""ABQ-LLM beside its baselines: quality, bytes, every ingredient, budgets of bytes, decoding speed; writes a result card.

    python -m experiments.abq_llm [--config=configs/lm/abq.py] [--seeds=0,1] [--settings=W4A4,W2A8] [--out=runs/abq_llm]

Every run (seed, scheme, method) is recorded in `--out` when it is done; a killed experiment goes on from there. Processes with
other `--seeds` or `--settings` may share `--out`. A run of all seeds and settings then times decoding and writes the card.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import configs.lm
from experiments import abq_card
from experiments import lm as experiment
from experiments.lm import LanguageModel, Text
from experiments.lm_baselines import text_names
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from jaxcomp.core.apply import compressed
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, materialise_tree, nbytes
from jaxcomp.core.report import report
from jaxcomp.core.transform import compress
from jaxcomp.evaluate.throughput import decoder, paired
from jaxcomp.io import orbax
from jaxcomp.models import Llama, layer_table
from jaxcomp.quantize import quantized_attention
from jaxcomp.quantize.allocate import Sensitivity, allocate, measure
from jaxcomp.quantize.attention import BlockRunner
from jaxcomp.quantize.learned import BLOCKS
from pallas_kernels.arbitrary_bit_matmul import five_levels

FLOAT, TREES = abq_card.FLOAT, "trees"
BUDGET_WIDTHS = tuple({"bits": bits} for bits in (2, 3, 4, 5, 6))
Results = dict[tuple[str, str], list[dict[str, Any]]]  # (scheme, method) -> one record per seed


class Bench(NamedTuple):
    """A model with the outliers of one seed, texts to score by name, and calibration data."""

    config: ConfigDict
    lm: LanguageModel
    windows: Mapping[str, Text]
    calibration: Calibration


def bench(config: ConfigDict, seed: int) -> Bench:
    """The bench of a seed: it draws the outlier channels and the calibration windows."""
    seeded = ConfigDict(config.to_dict() | {"seed": seed})
    lm = experiment.load_model(None, seeded)
    windows = {name: experiment.load_text(lm, seeded, experiment.read_texts(name)) for name in text_names()}
    return Bench(seeded, lm, windows, experiment.calibration(lm, seeded, windows["embedded"]))


def run_all(config: ConfigDict, out: pathlib.Path, seeds: Any, schemes: Any, overwrite: bool = False) -> Results:
    """The runs of these seeds and schemes, recorded one by one, and the decoding times where `schemes` are all."""
    results: Results = {}
    for seed in seeds:
        work = bench(config, seed)
        for scheme in schemes:
            for method, record in run_scheme(work, out, scheme, overwrite):
                results.setdefault((scheme, method), []).append(record)
            jax.clear_caches()  # programs serve one scheme; those of all exceed the memory maps that a process may have
    return results


def run_scheme(work: Bench, out: pathlib.Path, scheme: str, overwrite: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, record) of one seed and scheme."""
    config, options = work.config, work.config.schemes[scheme].to_dict()
    first = config.seed == config.seeds[0]
    folder = scheme_folder(out, config.seed, scheme)
    say = lambda line: print(f"seed {config.seed}, {scheme}, {line}", flush=True)
    stages = Stages(folder, identity(config, options), (TREES,), overwrite, say)
    for method, transform in planned(work, stages, scheme, options).items():
        kept = folder / TREES if first and config.timed.get(scheme) == method else None
        yield method, stages.run(method, lambda: one_run(work, options, transform, kept))  # noqa: B023 (called at once)


def scheme_folder(out: pathlib.Path, seed: int, scheme: str) -> pathlib.Path:
    """Where the records of a seed and scheme are."""
    return out / f"seed{seed}-{scheme.replace('*', 'star').replace(' ', '-')}"


def identity(config: ConfigDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of a scheme depend on."""
    every = config.to_dict()
    apart = ("schemes", "seeds", "ablated", "ablated_seeds", "timed", "prompt_tokens", "decode_tokens", "decode_rounds")
    facts = {name: experiment.source_digest(every.pop(name)) for name in ("methods", "ablations", "budgeted", "budget")}
    facts |= {"jax": jax.__version__, "texts": text_names(), "model_files": experiment.fingerprint(None)}
    return {name: value for name, value in every.items() if name not in apart} | facts | {"scheme": options}


def planned(work: Bench, stages: Stages, scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """{method: transform} of a scheme; the first seed alone has budgets, and the float model in its first scheme."""
    config, model = work.config, work.lm.config
    first = config.seed == config.seeds[0]
    if "budgets" in options:
        return budgeted(work, stages, options) if first else {}
    plan = config.methods(config, model, options)
    if scheme in config.ablated and config.seed in config.ablated_seeds:
        plan |= config.ablations(config, model, options)
    plan = {name: transform for name, transform in plan.items() if name in options.get("only", plan)}
    return ({FLOAT: None} if first and scheme == next(iter(config.schemes)) else {}) | plan


def budgeted(work: Bench, stages: Stages, options: Mapping[str, Any]) -> dict[str, Any]:
    """{method: transform} under rules that fill budgets of so many bits per weight on average."""
    config, grid = work.config, dict(symmetric=False)
    measured = stages.run(
        "sensitivity", lambda: to_json(measure(work.lm.params, work.calibration, BLOCKS, BUDGET_WIDTHS, **grid))
    )
    found, plan = from_json(measured), {}
    for bits in options["budgets"]:
        rules = allocate(found, budget_bytes(found, bits)).rules
        for name, transform in config.budgeted(config, work.lm.config, options, rules).items():
            plan[f"{name} at {bits} bits"] = transform
    return plan


def budget_bytes(found: Sensitivity, bits: float) -> int:
    """Bytes of the tree at this many bits per weight: between those of the two nearest uniform choices."""
    widths = [choice["bits"] for choice in found.choices]
    return found.rest + int(np.interp(bits, widths, found.bytes.sum(0)))


def to_json(found: Sensitivity) -> dict[str, Any]:
    """A sensitivity as JSON."""
    return dataclasses.asdict(found) | {"cost": found.cost.tolist(), "bytes": found.bytes.tolist()}


def from_json(body: Mapping[str, Any]) -> Sensitivity:
    """The inverse of `to_json`."""
    groups = {name: tuple(paths) for name, paths in body["groups"].items()}
    cost, size = np.array(body["cost"]), np.array(body["bytes"], np.int64)
    return Sensitivity(groups, tuple(body["choices"]), cost, size, body["rest"])


def one_run(work: Bench, options: Mapping[str, Any], transform: Any, keep: pathlib.Path | None) -> dict[str, Any]:
    """Compresses and scores; JSON-able. `keep` is where the tree is saved, to be timed later."""
    params, seconds, started = work.lm.params, 0.0, time.monotonic()
    if transform is not None:
        params, _, seconds = compress(transform, params, work.calibration)
    kv_bits = 16 if transform is None else options["kv_bits"]
    record = quality(work, params, kv_bits) | {"bytes": nbytes(params), "seconds": seconds}
    if transform is not None:
        record["bytes_per_weight"] = report(work.lm.params, params).bits_per_weight / 8
        record["storage"] = five_level_bytes(params)
        errors = export_error(work.lm.config, params, kv_bits, work.windows["embedded"].calibration[:2])
        record |= {"export_error": float(errors.max()), "export_median": float(np.median(errors))}
    if keep is not None:
        orbax.save(keep, params, overwrite=True)
    return record | {"elapsed": time.monotonic() - started}


def quality(work: Bench, params: Any, kv_bits: int) -> dict[str, Any]:
    """Nats per token and share of tokens ranked first, of every window of every text."""
    lm = dataclasses.replace(work.lm, run=runner(work.lm.config, kv_bits))
    scores = {name: experiment.score(lm, params, work.config, text) for name, text in work.windows.items()}
    per_token = lambda name, x: (x / scores[name].tokens_per_window).round(7).tolist()
    return {
        "nats": {name: per_token(name, s.nll) for name, s in scores.items()},
        "accuracy": {name: per_token(name, s.correct) for name, s in scores.items()},
    }


@functools.cache
def runner(config: Any, kv_bits: int) -> Any:
    """`(params, tokens) -> logits` with keys and values at some bits; one object, so that it is compiled once."""
    model = Llama(config, quantized_attention(kv_bits))
    return jax.jit(compressed(lambda params, tokens: model.apply({"params": params}, tokens)))


def export_error(config: Any, params: Any, kv_bits: int, tokens: Any) -> np.ndarray:
    """Largest difference of each token's logits, relative to the largest: integer products of codes against rounding in float."""
    found, want = runner(config, kv_bits)(params, tokens), fake_logits(config, kv_bits, params, tokens)
    return np.asarray(jnp.abs(found - want).max(-1) / jnp.abs(want).max())


@functools.partial(jax.jit, static_argnums=(0, 1))
def fake_logits(config: Any, kv_bits: int, params: Any, tokens: Any) -> jax.Array:
    """Logits where weights are decoded to float and activations are rounded in float, block by block."""
    dense, model = {"params": materialise_tree(params)}, Llama(config)
    x = model.apply(dense, tokens, method="embed_tokens")
    for i in range(config.num_layers):
        leaves = leaves_with_paths(params[f"blocks_{i}"])
        acts = {path: leaf.act for path, leaf in leaves.items() if is_compressed(leaf) and leaf.act is not None}
        inputs = tuple((path.removesuffix("/kernel"), act.grid) for path, act in acts.items())
        layer = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), layer_table(config))
        x, _ = BlockRunner(config, inputs, kv_bits)(dense["params"][f"blocks_{i}"], x, layer)
    return model.apply(dense, x, method="logits")


def five_level_bytes(params: Any) -> dict[str, float]:
    """Bytes per weight of every storage of five-level codes, scales and zero points included; empty without such leaves."""
    leaves = [leaf for leaf in leaves_with_paths(params).values() if is_compressed(leaf) and leaf.grid.count == 5]
    weights = sum(leaf.size for leaf in leaves)
    total: dict[str, float] = {}
    for leaf in leaves:
        metadata = leaf.nbytes - leaf.packed.nbytes
        for name, bits in five_levels.storage_bits(np.asarray(leaf.codes())).items():
            total[name] = total.get(name, 0.0) + (bits * leaf.size / 8 + metadata) / weights
    return total


def float_noise(config: ConfigDict, out: pathlib.Path) -> dict[str, float]:
    """{scheme: median error} of the float-rounded model against itself with embeddings times 1 + 1e-6, for the trees kept.

    It is what float error alone does to logits once activations are rounded: the yardstick of `export_error`.
    """
    work = bench(config, config.seeds[0])
    tokens, found = work.windows["embedded"].calibration[:2], {}
    for scheme in config.timed:
        params = orbax.restore(scheme_folder(out, config.seeds[0], scheme) / TREES)[0]
        moved = params | {"embed": jax.tree.map(lambda a: a * (1 + 1e-6), params["embed"])}
        kv_bits = config.schemes[scheme].kv_bits
        a, b = (np.asarray(fake_logits(work.lm.config, kv_bits, tree, tokens)) for tree in (params, moved))
        found[scheme] = float(np.median(np.abs(a - b).max(-1) / np.abs(a).max()))
    return found


def time_decoding(config: ConfigDict, out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Greedy decoding of one sequence by the whole model, float and packed, in one paired run; rows by method."""
    work = bench(config, config.seeds[0])
    trees = {FLOAT: work.lm.params}
    for scheme, method in config.timed.items():
        trees[f"{method} {scheme}"] = orbax.restore(scheme_folder(out, config.seeds[0], scheme) / TREES)[0]
    prompt = work.windows["embedded"].evaluation[:1, : config.prompt_tokens]
    decoders = {name: decoder(work.lm.module, tree, prompt, config.decode_tokens) for name, tree in trees.items()}
    times = paired({name: d.run for name, d in decoders.items()}, config.decode_rounds)
    rate = lambda name, q: float(decoders[name].tokens / np.quantile(times.seconds[name], q))
    return {
        name: {
            "tokens_per_second": [rate(name, 0.5), rate(name, 0.975), rate(name, 0.025)],
            "speedup": list(times.speedup(name, FLOAT)),
            "bytes": nbytes(tree),
            "step_bytes": decoders[name].memory.peak,
            "load": list(times.load),
        }
        for name, tree in trees.items()
    }


def main(argv) -> None:
    """Runs what is missing; writes the card if all was asked for."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, f = flags.FLAGS.config, flags.FLAGS
    seeds, schemes = [int(s) for s in f.seeds] or config.seeds, f.settings or list(config.schemes)
    if unknown := sorted(set(schemes) - set(config.schemes)) + sorted(set(seeds) - set(config.seeds)):
        raise ValueError(f"{unknown[0]!r}: expected settings of {list(config.schemes)} and seeds of {config.seeds}")
    out = pathlib.Path(f.out)
    results = run_all(config, out, seeds, schemes, f.overwrite)
    if f.seeds or f.settings:
        return
    speed, noise = time_decoding(config, out), float_noise(config, out)
    abq_card.card(config, results, speed, noise).write(f.results)
    abq_card.plot(results, pathlib.Path(f.results) / "abq_llm.png")
    print(f"{f.results}/abq_llm.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.lm.__file__).parent / "abq.py", "runs/abq_llm")
    flags.DEFINE_list("seeds", [], "Only these seeds; no card.")
    flags.DEFINE_list("settings", [], "Only these schemes; no card.")
    launch(main)
