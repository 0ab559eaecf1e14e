r"""Draws samples with the digits model of the package or one that `experiments.train_dit` exported, with or without a cache.

python -m experiments.sample --classes=0,1,2,3,4,5,6,7,8,9 --steps=30 --cache=ertacache --computed=12 --out=digits.png
python -m experiments.sample --bits=4 --corrector=tcec --out=digits.gif      (every step is a frame)
python -m experiments.sample --cache=ertacache --psnr=40 --report=budget.html

Caches: none, uniform, fora, teacache, magcache, taylorseer, dbcache, sencache, delta_dit, adacache, pab, fastercache, ertacache;
`--computed` is the number of steps that run the whole network (adacache finds its own; pab and fastercache leave out attention
only, in all steps that their published rules name). With ertacache a budget may stand in its place, `--psnr` or
`--relative_error` to the full run, and `--report` shows the whole curve of quality over computed steps. Progress is shown step by
step. Prints how far the samples are from those of the full run on the same noise. Videos: `experiments.sample_video`.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.runs import launch
from experiments.sample_caches import ATTENTION_ONLY, CACHES, FIXED, Draw, budgeted
from experiments.tcec import CORRECTORS, RULES
from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import compress
from jaxcomp.data import digits as data
from jaxcomp.data.embedded_dit import FOLDER
from jaxcomp.io.dit import load_dit
from jaxcomp.io.files import read_json, replacing
from jaxcomp.models.dit import DiT
from jaxcomp.quantize import rtn
from jaxcomp.sampling import Pipeline, guided, network, schedules, solvers, with_cache
from jaxcomp.sampling.cache.pareto import Batch
from jaxcomp.sampling.cache.quality import mean_interval, quality
from jaxcomp.sampling.cache.search import HitRate
from jaxcomp.sampling.compensate import ptqd, tac, tcec
from jaxcomp.sampling.compensate.trajectory import Model
from jaxcomp.sampling.corrector import Corrector, chain
from jaxcomp.sampling.policy import uncached

CALIBRATION, EVALUATION = 32, 64  # noises of calibrations; of a budget's curve
FITS = {"tcec": tcec.calibrate, "ptqd": ptqd.calibrate, "tac": tac.calibrate}


def make_solver(name: str, steps: int) -> solvers.LinearSolver:
    """euler for flow models; ddpm, ddim or dpmpp_2m for noise-predicting ones.

    Raises:
      ValueError: an unknown name, or impossible steps.
    """
    if name == "euler":
        return solvers.euler_flow(schedules.flow_grid(steps, shift=3.0))
    known = {"ddpm": solvers.ddpm, "ddim": solvers.ddim, "dpmpp_2m": solvers.dpmpp_2m}
    if name not in known:
        raise ValueError(f"solver: expected euler, {', '.join(known)}, found {name!r}")
    return known[name](schedules.vp_grid(schedules.cosine_betas(), steps, "leading"))


def build(folder: str, solver: solvers.LinearSolver, guidance: float) -> tuple[Pipeline, Any, tuple[int, ...]]:
    """(pipeline, params, shape of a latent).

    Raises:
      FileNotFoundError: there is no such folder.
      CheckpointError: the model's folder is damaged.
      ValueError: the model was trained for another kind of solver.
    """
    kind = "flow" if solver.name == "euler_flow" else "eps"
    path = pathlib.Path(folder or FOLDER / kind)
    if not path.is_dir():
        raise FileNotFoundError(f"--model: {path}: no such folder; experiments.train_dit exports one")
    config, params = load_dit(path)
    record = read_json(path / "training.json") if (path / "training.json").is_file() else {}
    if (trained := record.get("config", {}).get("objective", kind)) != kind:
        fitting = "euler" if trained == "flow" else "ddpm, ddim or dpmpp_2m"
        raise ValueError(f"--solver: the model in {path} predicts {trained!r}, use {fitting}")
    denoiser = guided(network(DiT(config)), guidance, jnp.int32(config.num_classes))
    return Pipeline(denoiser, solver), params, (*config.size, config.channels)


def quantize(params: Any, bits: int) -> Any:
    """Weights and activations of all blocks rounded to `bits` bits, groups of 24 inputs; 0 leaves the params as they are."""
    if not bits:
        return params
    return compress(rtn(bits, act_bits=bits, group_size=24, rules=RULES), params)[0]


def correct(kind: str, draw: Draw, cached: Pipeline, quantized: Any) -> Pipeline:
    """The pipeline with a corrector of quantization errors, calibrated on what will be sampled."""
    if kind == "none":
        return cached
    pipeline, params, batch = draw
    model = Model(cached.denoiser, quantized, cached.policy or uncached(), cached.corrector or Corrector())
    found = FITS[kind](Model(pipeline.denoiser, params), model, cached.solver, *batch)
    fix = CORRECTORS[kind](found)
    return cached.replace(corrector=fix if cached.corrector is None else chain(cached.corrector, fix))


def draw_samples(pipeline: Pipeline, params: Any, batch: Batch, key: Any) -> tuple[list[np.ndarray], HitRate]:
    """(latents after every step, computed steps), with live progress; one compiled program."""
    frames: dict[int, np.ndarray] = {}
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=pipeline.solver.steps)

        def see(i, x) -> None:
            frames[int(i)] = np.asarray(x)
            bar.update(task, completed=len(frames))

        def on_state(state, x, out, i):
            jax.debug.callback(see, jnp.asarray(i), x)
            return x, state

        watched = pipeline.replace(corrector=chain(pipeline.corrector or Corrector(), Corrector(on_state=on_state)))
        run = jax.jit(compressed(lambda params, x, cond, key: watched(params, x, cond, key, executor="cond")[1].mask))
        mask = np.asarray(run(params, *batch, key))
        jax.effects_barrier()
    return [frames[i] for i in sorted(frames)], HitRate(mask)


def write_pictures(path: pathlib.Path, frames: list[np.ndarray], columns: int, zoom: int = 8) -> None:
    """The last frame as PNG, or all of them as GIF; appears whole or not at all."""
    shown = frames if path.suffix == ".gif" else frames[-1:]
    sheets = [Image.fromarray(data.contact_sheet(data.to_images(x), columns, zoom)) for x in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        extra = dict(append_images=[*sheets[1:], *sheets[-1:] * 10], duration=100, loop=0) if len(sheets) > 1 else {}
        sheets[0].save(temporary, format=path.suffix[1:].upper(), save_all=bool(extra), **extra)


def check(args: Any) -> None:
    """Raises ValueError for settings that do not fit."""
    if not args.classes or not set(args.classes) <= {str(digit) for digit in range(data.NUM_CLASSES)}:
        raise ValueError(f"--classes: expected digits 0 to 9, found {','.join(args.classes)!r}")
    if pathlib.Path(args.out).suffix not in (".png", ".gif"):
        raise ValueError(f"--out: expected a name that ends in .png or .gif, found {args.out!r}")
    if args.computed > args.steps:
        raise ValueError(f"--computed: expected at most the {args.steps} steps of the solver, found {args.computed}")
    if args.computed and args.cache in ("none", *FIXED):
        which = "every step runs without a cache" if args.cache == "none" else f"{args.cache} chooses its steps itself"
        raise ValueError(f"--computed: {which}; leave it out, or choose another --cache")
    if len(qualities(args)) + bool(args.computed) > 1:
        raise ValueError("expected one of --computed, --psnr and --relative_error")
    if args.cache != "ertacache" and (args.report or qualities(args)):
        raise ValueError("--psnr, --relative_error and --report are for --cache=ertacache")
    if args.corrector != "none" and not args.bits:
        raise ValueError("--corrector removes quantization errors; give --bits")


def balanced(solver: solvers.LinearSolver, key: Any, count: int, shape: tuple[int, ...]) -> Batch:
    """Noises of all classes by turns."""
    return Batch(solver.initial(key, (count, *shape)), jnp.arange(count) % data.NUM_CLASSES)


def qualities(args: Any) -> dict[str, float]:
    """The budgets of quality that were given."""
    return {name: value for name in ("psnr", "relative_error") if (value := getattr(args, name)) is not None}


def put_cache(args: Any, draw: Draw, evaluation: Batch) -> Pipeline:
    """The pipeline with the cache that was asked for."""
    if args.cache == "none":
        return draw[0]
    computed = args.computed or args.steps // 2
    if args.report or qualities(args):
        config = budgeted(draw, evaluation, args.report, **(qualities(args) or {"computed": computed}))
    else:
        config = CACHES[args.cache](draw, computed)
    return with_cache(draw[0], config)


def run(args: Any) -> None:
    """Everything. Raises ValueError or CheckpointError for bad settings."""
    check(args)
    labels = [int(text) for text in args.classes]
    pipeline, params, shape = build(args.model, make_solver(args.solver, args.steps), args.guidance)
    start, noise, calibration, evaluation = jax.random.split(jax.random.key(args.seed), 4)
    cond = jnp.repeat(jnp.asarray(labels, jnp.int32), args.rows)
    batch = Batch(pipeline.solver.initial(start, (len(cond), *shape)), cond)
    draw = (pipeline, params, balanced(pipeline.solver, calibration, CALIBRATION, shape))
    cached = put_cache(args, draw, balanced(pipeline.solver, evaluation, EVALUATION, shape))
    quantized = quantize(params, args.bits)
    cached = correct(args.corrector, draw, cached, quantized)
    frames, hits = draw_samples(cached, quantized, batch, noise)
    write_pictures(pathlib.Path(args.out), frames, columns=args.rows)
    print(f"every step ran; {args.cache} leaves out attention only" if args.cache in ATTENTION_ONLY else hits)
    if args.cache != "none" or args.bits:
        full = jax.jit(lambda *a: pipeline(*a, executor="cond")[0])(params, *batch, noise)
        psnr = mean_interval(quality(frames[-1], np.asarray(full)).psnr)
        print(f"PSNR to the full run {psnr.value:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}] over {len(cond)} samples")
    print(args.out)


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("classes", [str(digit) for digit in range(10)], "Digits to draw, one row each.")
    flags.DEFINE_integer("rows", 8, "Samples per class.", lower_bound=1)
    flags.DEFINE_integer("steps", 30, "Steps of the solver.", lower_bound=2)
    flags.DEFINE_string("solver", "euler", "euler (flow model), or ddpm, ddim, dpmpp_2m (noise-predicting model).")
    flags.DEFINE_float("guidance", 1.5, "Weight of classifier-free guidance.")
    flags.DEFINE_enum("cache", "none", ["none", *CACHES], "Cache policy.")
    flags.DEFINE_integer("computed", 0, "Steps that run the network; half of them by default.", lower_bound=0)
    flags.DEFINE_float("psnr", None, "Least PSNR to the full run, dB, that ertacache is to keep.")
    flags.DEFINE_float("relative_error", None, "Largest relative error to the full run that ertacache may make.")
    flags.DEFINE_string("report", "", "HTML page, or PNG, of ertacache's quality over computed steps.")
    flags.DEFINE_integer("bits", 0, "Quantize weights and activations of the blocks to so many bits; 0 does not.")
    flags.DEFINE_enum("corrector", "none", ["none", *FITS], "Corrector of quantization errors.")
    flags.DEFINE_integer("seed", 0, "Of noise and calibration.")
    flags.DEFINE_string("model", "", "Folder of a trained model; the one of the package by default.")
    flags.DEFINE_string("out", "digits.png", "PNG of the samples, or GIF of all steps.")


def main(argv) -> None:
    """Runs with one-line errors."""
    del argv
    logging.set_verbosity(logging.WARNING)
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags()
    launch(main)
