"""What caches and correctors cost in a compiled sampler: trunks and products of the programs, and paired wall times; a card.

    python -m experiments.sampler_cost [--config=configs/diffusion/sampler_cost.py] [--out=runs/sampler_cost]

The model is a DiT with random weights, since times do not depend on them. Measure on an otherwise idle machine. Token-wise
updates of video models are timed by `experiments.motioncache`.
"""

import functools
import pathlib
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import configs.diffusion
from experiments.cards import Card, Row, current_commit, current_device
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from jaxcomp.evaluate.intervals import Interval
from jaxcomp.evaluate.throughput import paired
from jaxcomp.models.dit import DiT, init_params
from jaxcomp.models.dit_config import DiTConfig
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.cache.uniform import UniformCacheConfig
from jaxcomp.sampling.compensate.tcec import Tcec, tcec
from jaxcomp.sampling.explain import explain_sampler
from jaxcomp.sampling.network import network
from jaxcomp.sampling.pipeline import Pipeline, with_cache

COMMAND = "python -m experiments.sampler_cost"
PAPER = "Cost of skipped steps and of correctors (ERTACache, arXiv 2508.21091; TCEC, arXiv 2508.12094)"
FULL, CORRECTED, BRANCHES = "all steps", "all steps, TCEC ls2", ", a branch per step"
SLACK, OVERHEAD = 1.3, 1.02  # bars: time over n / T of the full run's; time with a corrector over that without


def pipelines(config: ConfigDict) -> tuple[dict[str, Pipeline], Any, Any]:
    """({name: pipeline}, params, noise)."""
    model = DiTConfig(**config.model)
    params, keys = init_params(model, jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params)
    full = Pipeline(network(DiT(model)), solvers.euler_flow(schedules.flow_grid(config.steps, shift=3.0)))
    x = full.solver.initial(jax.random.key(2), (config.batch, *model.size, model.channels))
    weights = 1e-3 * jax.random.normal(jax.random.key(3), (config.steps, 2, x[0].size))
    found = {FULL: full, CORRECTED: full.replace(corrector=tcec(Tcec(weights, weights[:, 0])))}
    for n in config.computed:
        cached = with_cache(full, UniformCacheConfig(computed=n))
        found |= {name(config, n): cached, name(config, n) + BRANCHES: cached.replace(executor="cond")}
    return found, params, x


def name(config: ConfigDict, computed: int) -> str:
    """Of a plan."""
    return f"{computed} of {config.steps} steps"


def measure(config: ConfigDict) -> dict[str, Any]:
    """{"programs": {name: [trunk bodies, products]}, "times": {name: time over that of all steps}}; JSON-able."""
    started, (found, params, x) = time.monotonic(), pipelines(config)
    programs, functions = {}, {}
    for label, pipeline in found.items():
        run = jax.jit(lambda params, x, p=pipeline: p(params, x)[0])
        program = explain_sampler(run, params, x)
        programs[label] = [program.bodies, program.matmuls]
        functions[label] = functools.partial(run, params, x)
    plans = {label: run for label, run in functions.items() if label != CORRECTED}
    timed = paired(plans, config.rounds)
    corrected = paired({label: functions[label] for label in (FULL, CORRECTED)}, config.corrector_rounds)
    times = {label: _inverse(timed.speedup(label, FULL)) for label in plans}
    times[CORRECTED] = _inverse(corrected.speedup(CORRECTED, FULL))
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    setting = (
        f"DiT of {size:.1f} M parameters, {DiTConfig(**config.model).num_tokens} tokens, batch {config.batch}, float32"
    )
    return {
        "setting": setting,
        "programs": programs,
        "times": times,
        "load": [timed.load[0], corrected.load[1]],
        "seconds": time.monotonic() - started,
    }


def _inverse(speedup: Interval) -> list[float]:
    return [1 / value for value in (speedup.value, speedup.high, speedup.low)]


def rows(config: ConfigDict, found: dict[str, Any]) -> list[Row]:
    """Contents of the programs; times, and for plans the times as multiples of n / T."""
    out, setting = [], found["setting"]
    for label, counts in found["programs"].items():
        for metric, count in zip(("trunks in the program", "dot and convolution instructions"), counts, strict=True):
            out.append(Row(label, setting, metric, "", *[float(count)] * 3))
        if label != FULL:
            out.append(Row(label, setting, "time / time of all steps", "", *found["times"][label]))
    for n in config.computed:
        for label in (name(config, n), name(config, n) + BRANCHES):
            share = [value * config.steps / n for value in found["times"][label]]
            out.append(Row(label, setting, "time over n / T", "", *share))
    return out


def verdicts(config: ConfigDict, found: dict[str, Any]) -> list[str]:
    """Which bars are met, from the numbers."""
    programs, (value, low, high) = found["programs"], found["times"][CORRECTED]
    added = programs[CORRECTED][1] - programs[FULL][1]
    judge = lambda value, bar: "met" if value <= bar else "MISSED"
    out = [
        f"TCEC ls2 adds {added} dot or convolution instructions; bar 0 {judge(added, 0)}",
        f"TCEC ls2 takes {100 * (value - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}] of the time; "
        f"bar {100 * (OVERHEAD - 1):.0f} % {judge(value, OVERHEAD)}",
    ]
    for n in config.computed:
        bodies, share = programs[name(config, n)][0], found["times"][name(config, n)][0] * config.steps / n
        out.append(f"{name(config, n)}: {bodies} trunks in the program; bar {n} {judge(abs(bodies - n), 0)}")
        out.append(f"{name(config, n)}: {share:.2f} n / T of the time; bar {SLACK} {judge(share, SLACK)}")
    return out


def card(config: ConfigDict, found: dict[str, Any]) -> Card:
    """The result card."""
    rounds, load = config.rounds, " and ".join(f"{value:.1f}" for value in found["load"])
    return Card(
        name="sampler_cost",
        paper=PAPER,
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=found["seconds"] / 60,
        seeds=[0],
        rows=rows(config, found),
        departures=[
            f"Intervals are over {rounds} interleaved rounds, {config.corrector_rounds} for the corrector; load of the machine "
            f"before and after: {load}",
            *verdicts(config, found),
        ],
    )


def main(argv) -> None:
    """Measures, unless that is recorded, and writes the card."""
    del argv
    args = flags.FLAGS
    stages = Stages(args.out, args.config.to_dict() | {"jax": jax.__version__}, overwrite=args.overwrite)
    found = stages.run("times", lambda: measure(args.config))
    card(args.config, found).write(args.results)
    print(f"{args.results}/sampler_cost.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.diffusion.__file__).parent / "sampler_cost.py", "runs/sampler_cost")
    launch(main)
