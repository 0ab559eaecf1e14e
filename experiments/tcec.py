"""Compensation of quantization errors in diffusion samplers side by side; writes a result card.

    python -m experiments.tcec [--config=configs/diffusion/tcec.py] [--out=runs/tcec]

Every run (setting, seed) is recorded in `--out` when it is done; a killed experiment goes on from there. Needs no data: the
models are the digits that ship with the package.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import configs.diffusion
from experiments.cards import Card, Row, current_commit, current_device
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from experiments.train_dit import make_solver
from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.data.digits import NUM_CLASSES
from jaxcomp.data.embedded_dit import load_digits_dit
from jaxcomp.quantize import rtn, svdquant
from jaxcomp.sampling.cache.quality import mean_interval, quality
from jaxcomp.sampling.compensate import ptqd, tac, tcec
from jaxcomp.sampling.compensate.data import calibration
from jaxcomp.sampling.compensate.report import error_report
from jaxcomp.sampling.compensate.select import select_gain
from jaxcomp.sampling.compensate.tcec import TcecConfig
from jaxcomp.sampling.compensate.trajectory import Model, trajectory
from jaxcomp.sampling.corrector import Corrector, chain
from jaxcomp.sampling.denoiser import Denoiser, guided
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.network import network
from jaxcomp.sampling.solvers import LinearSolver

COMMAND = "python -m experiments.tcec"
PAPER = "TCEC: Error Propagation Mechanisms and Compensation Strategies for Quantized Diffusion, arXiv 2508.12094"
PAPER_GAIN, PAPER_NOTE = 1.2, "Published gain: SDXL at 50 steps, W4A4, over SVDQuant (abstract of arXiv 2508.12094)"
RULES = (Rule("blocks_*/attn/*/kernel"), Rule("blocks_*/mlp/*/kernel"))
NONE, LS2 = "none", "TCEC ls2"
FORMS = {
    "TCEC paper K, in place": TcecConfig("inplace", "paper"),
    "TCEC paper K, window of 1": TcecConfig("window1", "paper"),
    "TCEC paper K, every second step": TcecConfig("window1_alt", "paper"),
    "TCEC closed loop, one output, per channel": TcecConfig("inplace"),
    "TCEC ls2, per channel": TcecConfig("ls2"),
    "TCEC closed loop, one output": TcecConfig("inplace", per="position", ridge=0.1),
    LS2: TcecConfig("ls2", per="position", ridge=0.1),
}
Results = dict[str, list[dict[str, Any]]]  # setting -> one record per seed


class Case(NamedTuple):
    """A model, its quantized form and a solver.

    Attributes:
      full: full precision.
      quantized: of the same denoiser.
      solver: of both.
    """

    full: Model
    quantized: Model
    solver: LinearSolver


class Noises(NamedTuple):
    """Noises and classes."""

    x: Float[Array, "N h w C"]
    labels: Array


@functools.cache
def denoiser_of(objective: str, guidance: float) -> tuple[Denoiser, Denoiser, Any]:
    """(sampled denoiser, its unguided branch, params) of the shipped digits."""
    model, params = load_digits_dit(objective)
    plain = network(model)
    return (plain if guidance == 1 else guided(plain, guidance, jnp.int32(NUM_CLASSES))), plain, params


def build(setting: ConfigDict, seed: int, count: int) -> Case:
    """Quantizes the model of a setting; what needs data gets inputs from its own trajectories (Q-Diffusion)."""
    denoiser, plain, params = denoiser_of(setting.objective, setting.guidance)
    solver = make_solver(setting.objective, setting.steps)
    scheme = dict(act_bits=setting.act_bits, group_size=setting.group_size)
    if setting.rank:
        noises = draw_noises(seed, "quantize", count)
        stats = calibration(Model(plain, params), solver, noises.x, noises.labels)
        transform = svdquant(setting.bits, rank=setting.rank, smooth=setting.smooth, rules=RULES, **scheme)
    else:
        stats, transform = None, rtn(setting.bits, rules=RULES, **scheme)
    quantized = compress(transform, params, stats)[0]
    return Case(Model(denoiser, params), Model(denoiser, quantized), solver)


def draw_noises(seed: int, purpose: str, count: int) -> Noises:
    """Noises of one purpose ("quantize", "calibrate", "evaluate"); those of different purposes and seeds are independent."""
    key = jax.random.fold_in(jax.random.key(seed), ("quantize", "calibrate", "evaluate").index(purpose))
    noise_key, label_key = jax.random.split(key)
    labels = jax.random.randint(label_key, (count,), 0, NUM_CLASSES)
    return Noises(jax.random.normal(noise_key, (count, 4, 4, 4)), labels)


CORRECTORS: Mapping[str, Callable[[Any], Corrector]] = {
    "none": lambda _: Corrector(),
    "tcec": tcec.tcec,
    "ptqd": ptqd.ptqd,
    "tac": tac.tac,
}


@functools.partial(jax.jit, static_argnames="kind")
def draw(model: Model, solver: LinearSolver, noises: Noises, kind: str, coefficients: Any) -> Float[Array, "N h w C"]:
    """Samples with a corrector of `CORRECTORS`."""

    def run(model, coefficients):
        corrector = chain(model.corrector, CORRECTORS[kind](coefficients))
        options = dict(policy=model.policy, corrector=corrector, executor="cond")
        return sample(model.denoiser, model.params, noises.x, noises.labels, solver, **options)[0]

    return compressed(run)(model, coefficients)


def calibrated(case: Case, noises: Noises) -> dict[str, tuple[str, Any]]:
    """{method: (kind of corrector, coefficients)}."""
    both = (case.full, case.quantized, case.solver, *noises)
    found = {NONE: ("none", None), "PTQD": ("ptqd", ptqd.calibrate(*both)), "TAC": ("tac", tac.calibrate(*both))}
    exact = (trajectory(case.full, case.solver, *noises), *both[1:])
    found |= {name: ("tcec", tcec.calibrate(*exact, form)) for name, form in FORMS.items()}
    chosen = select_gain(*both, FORMS[LS2], gains=(1.0,))
    return found | {f"{LS2}, where it serves held-out noises": ("tcec", chosen.coefficients)}


def one_run(config: ConfigDict, setting: ConfigDict, seed: int) -> dict[str, Any]:
    """Quantizes, calibrates and samples; JSON-able."""
    started = time.monotonic()
    case = build(setting, seed, config.calibration)
    methods = calibrated(case, draw_noises(seed, "calibrate", config.calibration))
    noises = draw_noises(seed, "evaluate", config.evaluation)
    exact = draw(case.full, case.solver, noises, "none", None)
    scores = {}
    for method, (kind, coefficients) in methods.items():
        found = draw(case.quantized, case.solver, noises, kind, coefficients)
        scores[method] = quality(found, exact).psnr.round(4).tolist()
    errors = error_report(case.full, case.quantized, case.solver, *noises)
    return {
        "psnr": scores,
        "errors": {name: value.round(5).tolist() for name, value in errors._asdict().items()},
        "bytes": nbytes(case.quantized.params),
        "elapsed": time.monotonic() - started,
    }


def run_all(config: ConfigDict, stages: Stages) -> Results:
    """All runs, recorded one by one."""
    results: Results = {}
    for name, setting in config.settings.items():
        for seed in config.seeds:  # programs are compiled once per setting
            work = lambda setting=setting, seed=seed: one_run(config, setting, seed)
            results.setdefault(name, []).append(stages.run(f"{name}, seed {seed}", work))
    return results


def table(records: list[dict[str, Any]], method: str) -> np.ndarray:
    """PSNR of a method, [seeds, samples]."""
    return np.array([record["psnr"][method] for record in records])


def rows(config: ConfigDict, results: Results) -> list[Row]:
    """One table per setting: PSNR to the full-precision sample of the same noise, gain over no compensation, errors."""
    out = []
    for name, records in results.items():
        for method in records[0]["psnr"]:
            values, plain = table(records, method), table(records, NONE)
            out.append(Row(method, name, "psnr", "dB", *mean_interval(values)))
            if method != NONE:
                published = (PAPER_GAIN, PAPER_NOTE) if (method, name) == (LS2, config.published) else (None, "")
                out.append(Row(method, name, "gain over none", "dB", *mean_interval(values - plain), *published))
        errors = [record["errors"] for record in records]
        for key, metric in (("without_jacobian", "J = 0"), ("first_order", "first order")):
            ends = [e[key][-1] for e in errors]
            spread = (float(np.mean(ends)), min(ends), max(ends))
            out.append(Row(NONE, name, f"relative_error of the predicted deviation, {metric}", "", *spread))
    return out


def claims(config: ConfigDict, results: Results) -> list[str]:
    """Which bars are met, from the numbers."""
    out = []
    for name, bar in config.bars.items():
        value, low, high = mean_interval(table(results[name], LS2) - table(results[name], NONE))
        verdict = "met" if low >= bar else "met on average" if value >= bar else "missed"
        out.append(
            f"{name}: {LS2} gains {value:+.2f} dB [{low:+.2f}, {high:+.2f}] over none; bar {bar:+.1f} dB {verdict}"
        )
    for name, records in results.items():
        best = {method: float(table(records, method).mean()) for method in records[0]["psnr"]}
        order = sorted(best, key=best.get, reverse=True)
        out.append(f"{name}: best first, {', '.join(f'{method} {best[method]:.2f}' for method in order[:4])} dB")
    return out


def card(config: ConfigDict, results: Results) -> Card:
    """The result card."""
    return Card(
        name="tcec",
        paper=PAPER,
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=sum(record["elapsed"] for records in results.values() for record in records) / 60,
        seeds=list(config.seeds),
        rows=rows(config, results),
        departures=[*config.departures, *claims(config, results)],
    )


def main(argv) -> None:
    """Runs what is missing and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, f = flags.FLAGS.config, flags.FLAGS
    stages = Stages(f.out, config.to_dict() | {"jax": jax.__version__}, overwrite=f.overwrite)
    results = run_all(config, stages)
    card(config, results).write(f.results)
    print(f"{f.results}/tcec.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.diffusion.__file__).parent / "tcec.py", "runs/tcec")
    launch(main)
