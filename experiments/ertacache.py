"""ERTACache and its rivals at equal numbers of computed steps; writes a result card.

    python -m experiments.ertacache [--config=configs/diffusion/ertacache.py] [--out=runs/ertacache]

Every seed, and the timing, is recorded in `--out` when it is done; a killed experiment goes on from there.
"""

import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

import configs.diffusion
from experiments.cards import current_device
from experiments.ertacache_card import card
from experiments.ertacache_methods import Bench, baselines, variants
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from jaxcomp.data import digits as data
from jaxcomp.data.embedded_dit import FOLDER
from jaxcomp.evaluate.throughput import paired
from jaxcomp.io.dit import load_dit
from jaxcomp.models.dit import DiT
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.cache.ertacache import ErtaSettings, calibrate
from jaxcomp.sampling.cache.pareto import Batch
from jaxcomp.sampling.cache.quality import quality
from jaxcomp.sampling.compensate.key import digest
from jaxcomp.sampling.denoiser import guided
from jaxcomp.sampling.network import network
from jaxcomp.sampling.pipeline import Pipeline, with_cache


class Digits(NamedTuple):
    """The trained model as a pipeline."""

    pipeline: Pipeline
    params: Any
    shape: tuple[int, ...]


def load(config: ConfigDict) -> Digits:
    """The model, guided, with its Euler solver. Raises CheckpointError if the folder is damaged."""
    model_config, params = load_dit(config.model or FOLDER / "flow")
    denoiser = guided(network(DiT(model_config)), config.guidance, jnp.int32(data.NUM_CLASSES))
    solver = solvers.euler_flow(schedules.flow_grid(config.steps, config.shift))
    return Digits(Pipeline(denoiser, solver), params, (*model_config.size, model_config.channels))


def noises(digits: Digits, seed: int, role: int, count: int) -> Batch:
    """Noises and classes of a seed; `role` 0 is for calibration, 1 for evaluation."""
    noise, label = jax.random.split(jax.random.fold_in(jax.random.key(seed), role))
    x = digits.pipeline.solver.initial(noise, (count, *digits.shape))
    return Batch(x, jax.random.randint(label, (count,), 0, data.NUM_CLASSES))


def run_seed(config: ConfigDict, digits: Digits, seed: int) -> dict[str, Any]:
    """All methods on one seed: {"N": {method: {psnr, relative_error, mask}}}, and facts about the plans."""
    started = time.monotonic()
    calibration, evaluation = (
        noises(digits, seed, role, count) for role, count in enumerate((config.calibration, config.evaluation))
    )
    bench = Bench(config, digits.pipeline, digits.params, calibration, evaluation)
    full = bench.full
    runs: dict[str, dict[str, Any]] = {}
    for n in config.computed:
        for name, (x, mask) in {**baselines(bench, n), **variants(bench, n)}.items():
            scores = quality(x, full)
            runs.setdefault(str(n), {})[name] = {
                "psnr": scores.psnr.round(4).tolist(),
                "relative_error": scores.relative_error.round(6).tolist(),
                "mask": "".join(str(int(flag)) for flag in mask),
            }
    return {"runs": runs, "elapsed": time.monotonic() - started}


def run_timing(config: ConfigDict, digits: Digits) -> dict[str, Any]:
    """Paired wall times of the full sampler and of ERTACache plans, compiled with the static executor."""
    calibration, timed = noises(digits, 0, 0, config.calibration), noises(digits, 0, 1, config.timing_batch)
    functions, started = {}, time.monotonic()

    def add(name: str, pipeline: Pipeline) -> None:
        program = jax.jit(lambda *args: pipeline(*args, executor="static")[0]).lower(digits.params, *timed).compile()
        functions[name] = lambda: program(digits.params, *timed)

    add("full", digits.pipeline)
    for n in config.computed:
        settings = ErtaSettings(computed=n, window=config.window)
        add(
            str(n),
            with_cache(digits.pipeline, calibrate(digits.pipeline, settings, digits.params, *calibration).config),
        )
    result = paired(functions, rounds=config.timing_rounds)
    ratios = {str(n): list(result.speedup(str(n), "full")) for n in config.computed}
    median = {name: float(np.median(seconds)) for name, seconds in result.seconds.items()}
    return {"speedup": ratios, "seconds": median, "load": result.load, "elapsed": time.monotonic() - started}


def main(argv) -> None:
    """Runs what is missing and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config, args = flags.FLAGS.config, flags.FLAGS
    digits = load(config)
    facts = {"model_digest": digest(digits.params), "jax": jax.__version__}
    stages = Stages(args.out, config.to_dict() | facts, overwrite=args.overwrite)
    seeds = [stages.run(f"seed {seed}", lambda seed=seed: run_seed(config, digits, seed)) for seed in config.seeds]
    timing = stages.run("timing", lambda: run_timing(config, digits))
    device = current_device()
    card(config, seeds, timing, device).write(args.results)
    print(f"{args.results}/ertacache.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.diffusion.__file__).parent / "ertacache.py", "runs/ertacache")
    launch(main)
