"""Caches, quantization and correctors of one sampler, in all combinations; writes a result card.

    python -m experiments.cache_quantization [--config=configs/diffusion/cache_quantization.py] [--out=runs/cache_quantization]

Every run (precision, cache, seed), and the timing, is recorded in `--out` when it is done; a killed experiment goes on from
there. Needs no data: the model is the flow-matching digits that ship with the package.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import configs.diffusion
from experiments.cards import Card, Row, current_commit, current_device
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from experiments.tcec import FORMS, LS2, Case, Noises, build, draw, draw_noises
from jaxcomp.core.apply import compressed
from jaxcomp.evaluate.throughput import paired
from jaxcomp.sampling.cache.ertacache import ErtaSettings
from jaxcomp.sampling.cache.ertacache import calibrate as calibrate_erta
from jaxcomp.sampling.cache.ertacache.rectify import rectifier
from jaxcomp.sampling.cache.fora import FORAConfig
from jaxcomp.sampling.cache.quality import mean_interval, quality
from jaxcomp.sampling.cache.uniform import UniformCacheConfig
from jaxcomp.sampling.compensate import tcec
from jaxcomp.sampling.compensate.trajectory import Model
from jaxcomp.sampling.corrector import chain
from jaxcomp.sampling.pipeline import Pipeline, with_cache

COMMAND = "python -m experiments.cache_quantization"
PAPER = "Caches (ERTACache, arXiv 2508.21091; FORA, 2407.01425) x quantization x correctors (TCEC, 2508.12094)"
FULL, NO_CACHE, ERTA = "FP32", "no cache", "ERTACache plan"
NONE, FOREIGN, OWN, RECTIFIED, BOTH = "none", "ls2 of the run without cache", "ls2", "rectifier", "rectifier + ls2"
Results = dict[tuple[str, str], list[dict[str, Any]]]  # (precision, cache) -> one record per seed


def cached_model(model: Model, case: Case, name: str, config: ConfigDict, noises: Noises) -> tuple[Model, Any]:
    """(model with a cache, rectifier of its reuse errors or None); what needs calibration gets full precision."""
    if name == NO_CACHE:
        return model, None
    pipeline = Pipeline(model.denoiser, case.solver)
    if name == ERTA:
        settings = ErtaSettings(computed=config.computed, phi="off", gate=False)
        plan = calibrate_erta(pipeline, settings, case.full.params, *noises).config
        with_plan = with_cache(pipeline, plan)
        return dataclasses.replace(model, policy=with_plan.policy), rectifier(plan.plan.k, plan.plan.b)
    configs_by_name = {
        "uniform": UniformCacheConfig(computed=config.computed),
        "FORA": FORAConfig(interval=case.solver.steps // config.computed),
    }
    return dataclasses.replace(model, policy=with_cache(pipeline, configs_by_name[name]).policy), None


def one_run(config: ConfigDict, precision: str, cache: str, seed: int) -> dict[str, Any]:
    """All correctors of one cell; JSON-able."""
    started = time.monotonic()
    setting = ConfigDict(config.precisions[FULL].to_dict() | config.precisions[precision].to_dict())
    case = build(setting, seed, config.calibration)
    calibrate_on, evaluate_on = (draw_noises(seed, purpose, n) for purpose, n in purposes(config))
    model, fix = cached_model(case.quantized, case, cache, config, calibrate_on)
    exact = np.asarray(draw(case.full, case.solver, evaluate_on, "none", None))
    fit = lambda model: tcec.calibrate(case.full, model, case.solver, *calibrate_on, FORMS[LS2])
    runs = {NONE: (model, None)}
    if (precision, cache) != (FULL, NO_CACHE):
        runs[OWN] = (model, fit(model))
    if precision != FULL and cache != NO_CACHE:
        runs[FOREIGN] = (model, fit(case.quantized))
    if fix is not None:
        rectified = dataclasses.replace(model, corrector=fix)
        runs |= {RECTIFIED: (rectified, None), BOTH: (rectified, fit(rectified))}
    scores = {}
    for name, (chosen, coefficients) in runs.items():
        kind = "none" if coefficients is None else "tcec"
        found = quality(draw(chosen, case.solver, evaluate_on, kind, coefficients), exact)
        scores[name] = {"psnr": found.psnr.round(4).tolist(), "relative_error": found.relative_error.round(6).tolist()}
    computed = int(np.sum(model.policy.plan(case.solver.steps)))
    return {"scores": scores, "computed": computed, "elapsed": time.monotonic() - started}


def purposes(config: ConfigDict) -> tuple[tuple[str, int], ...]:
    """(purpose, number) of the noises of a run."""
    return ("calibrate", config.calibration), ("evaluate", config.evaluation)


def run_all(config: ConfigDict, stages: Stages) -> Results:
    """All cells, recorded one by one."""
    results: Results = {}
    for seed in config.seeds:
        for precision in config.precisions:
            for cache in config.caches:
                work = lambda p=precision, c=cache, s=seed: one_run(config, p, c, s)
                record = stages.run(f"{precision}, {cache}, seed {seed}", work)
                results.setdefault((precision, cache), []).append(record)
    return results


def run_timing(config: ConfigDict) -> dict[str, Any]:
    """Paired wall times of compiled samplers: full precision, caches, and packed weights, with and without corrector."""
    started, functions = time.monotonic(), {}
    setting = ConfigDict(config.precisions[FULL].to_dict() | config.precisions[config.timed_precision].to_dict())
    case = build(setting, 0, config.calibration)
    calibrate_on, timed = (draw_noises(0, purpose, config.timing_batch) for purpose, _ in purposes(config))
    for precision, model in ((FULL, case.full), (config.timed_precision, case.quantized)):
        for cache in (NO_CACHE, ERTA):
            chosen, _ = cached_model(model, case, cache, config, calibrate_on)
            plain = f"{precision}, {cache}"
            functions[plain] = _program(chosen, case, timed)
            correct = tcec.tcec(tcec.calibrate(case.full, chosen, case.solver, *calibrate_on, FORMS[LS2]))
            corrected = dataclasses.replace(chosen, corrector=chain(chosen.corrector, correct))
            functions[f"{plain}, ls2"] = _program(corrected, case, timed)
    result = paired(functions, rounds=config.timing_rounds)
    base = f"{FULL}, {NO_CACHE}"
    pairs = {name: list(result.speedup(name, base)) for name in functions}
    overhead = {
        name: list(result.speedup(name.removesuffix(", ls2"), name)) for name in functions if name.endswith("ls2")
    }
    return {"speedup": pairs, "overhead": overhead, "load": result.load, "elapsed": time.monotonic() - started}


def _program(model: Model, case: Case, noises: Noises):
    pipeline = Pipeline(model.denoiser, case.solver, model.policy, model.corrector, "static")
    run = compressed(lambda params, x, labels: pipeline(params, x, labels)[0])
    program = jax.jit(run).lower(model.params, *noises).compile()
    return lambda: program(model.params, *noises)


def rows(config: ConfigDict, results: Results, timing: dict[str, Any]) -> list[Row]:
    """One table per precision: cache and corrector down, scores across; then the timing."""
    out = []
    for (precision, cache), records in results.items():
        for corrector in records[0]["scores"]:
            method = f"{cache}, {corrector}"
            for metric, unit in (("psnr", "dB"), ("relative_error", "")):
                values = np.array([record["scores"][corrector][metric] for record in records])
                if (precision, cache) != (FULL, NO_CACHE):
                    out.append(Row(method, precision, metric, unit, *mean_interval(values)))
            out.append(Row(method, precision, "computed_steps", "", *[float(records[0]["computed"])] * 3))
    where = f"wall time, batch {config.timing_batch}, {config.steps} steps, paired with {FULL}, {NO_CACHE}"
    out += [Row(name, where, "speedup", "", *values) for name, values in timing["speedup"].items()]
    overhead = f"time of a run with ls2 over that without, batch {config.timing_batch}"
    return out + [Row(name, overhead, "time ratio", "", *values) for name, values in timing["overhead"].items()]


def mean_psnr(results: Results, precision: str, cache: str, corrector: str) -> float:
    """Over seeds and samples."""
    return float(np.mean([record["scores"][corrector]["psnr"] for record in results[precision, cache]]))


def claims(config: ConfigDict, results: Results) -> list[str]:
    """What the matrix says, from the numbers."""
    out = []
    for precision in config.precisions:
        for cache in config.caches:
            scores = results[precision, cache][0]["scores"]
            if OWN not in scores:
                continue
            base = mean_psnr(results, precision, cache, NONE)
            gains = {name: mean_psnr(results, precision, cache, name) - base for name in scores if name != NONE}
            text = ", ".join(f"{name} {gain:+.2f} dB" for name, gain in gains.items())
            out.append(f"{precision}, {cache}: {base:.2f} dB without corrector; {text}")
    return out


def card(config: ConfigDict, results: Results, timing: dict[str, Any]) -> Card:
    """The result card."""
    elapsed = [record["elapsed"] for records in results.values() for record in records]
    return Card(
        name="cache_quantization_matrix",
        paper=PAPER,
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=(sum(elapsed) + timing["elapsed"]) / 60,
        seeds=list(config.seeds),
        rows=rows(config, results, timing),
        departures=[*config.departures, *claims(config, results)],
    )


def main(argv) -> None:
    """Runs what is missing and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, f = flags.FLAGS.config, flags.FLAGS
    stages = Stages(f.out, config.to_dict() | {"jax": jax.__version__}, overwrite=f.overwrite)
    results = run_all(config, stages)
    timing = stages.run("timing", lambda: run_timing(config))
    card(config, results, timing).write(f.results)
    print(f"{f.results}/cache_quantization_matrix.md")


if __name__ == "__main__":
    define_card_flags(
        pathlib.Path(configs.diffusion.__file__).parent / "cache_quantization.py", "runs/cache_quantization"
    )
    launch(main)
