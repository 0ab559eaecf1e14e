"""RLFN, IMDN and DITN of one size under one budget of patches, and the stages of RLFN: PSNR on Set5 beside bicubic.

    JAXCOMP_DATA=FOLDER python -m experiments.sr_budget --workdir=runs/sr_budget
    JAXCOMP_DATA=FOLDER python -m experiments.sr_budget --workdir=runs/sr_budget --card=sr_stages --seeds=0,1

The card `sr_budget` has the networks, `sr_stages` has RLFN's stages. Trains every arm of the card (configs/sr/budget.py) with
every seed on the images that ship with scikit-image; a run that was killed goes on, one that has ended is only scored. Needs
sr/set5. About 25 and 10 minutes on one idle CPU core.
"""

import itertools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags, logging
from jaxtyping import Float

from configs.sr import budget
from experiments import sr, train_sr
from experiments.cards import Card, Row, command_line, current_commit
from experiments.runs import launch
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.restoration import restorer
from jaxcomp.io.super_resolution import param_shapes

LABELS = {
    "rlfn": "RLFN, tiny",
    "imdn": "IMDN, tiny",
    "ditn": "DITN, tiny",
    "one_schedule": "RLFN, tiny: one schedule",
    "warm_start": "RLFN, tiny: warm starts",
    "contrastive": "RLFN, tiny: warm starts, contrastive",
}
CARDS = {"sr_budget": ("rlfn", "imdn", "ditn"), "sr_stages": ("one_schedule", "warm_start", "contrastive")}
PAIRS = (("rlfn", "imdn"), ("rlfn", "ditn"), ("warm_start", "one_schedule"), ("contrastive", "warm_start"))
METRICS = (("psnr_y", "dB"), ("ssim_y", ""))
DEPARTURES = (
    "Tiny networks on eight images and thousands of patches: not the papers' training, whose tables are not comparable. The "
    "budget is one of patches and steps, not of time: a step of DITN takes about five of RLFN.",
    "One learning rate and schedule for all, chosen for RLFN; DITN's authors publish none.",
    "Intervals: 95 %, bootstrap over seeds and images together (over images alone for bicubic). Those of a mean are wide "
    "because the five images differ; a gain or difference is paired by image, and by seed.",
)

Scores = Mapping[str, Float[np.ndarray, "seeds images"]]


def score(
    arm: str, seed: int, workdir: pathlib.Path, pairs: Sequence[tuple[str, sr.Image, sr.Image]]
) -> dict[str, list[float]]:
    """Trains an arm, or goes on, and scores it: {metric: value per image}."""
    config = budget.get_config(arm)
    config.seed = seed
    done = train_sr.train(config, workdir / f"{arm}_{seed}")
    luma, _ = sr.scores(restorer(done.model, done.params), pairs, done.model.scale)
    print(f"{arm}, seed {seed}: {luma.psnr:.3f} dB on {len(pairs)} images", flush=True)
    return {"psnr_y": list(luma.psnrs.values()), "ssim_y": list(luma.ssims.values())}


def bootstrap(values: Float[np.ndarray, "seeds images"], draws: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval over seeds and images, each drawn with replacement; generator seed 0."""
    rng, (seeds, images) = np.random.default_rng(0), values.shape
    rows, columns = rng.integers(seeds, size=(draws, seeds, 1)), rng.integers(images, size=(draws, 1, images))
    low, high = np.quantile(values[rows, columns].mean(axis=(1, 2)), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def rows(found: Mapping[str, Scores], bicubic: Scores, setting: str) -> list[Row]:
    """Means of every arm, gains over bicubic, and differences between pairs of arms."""
    result = [Row("bicubic", setting, metric, unit, *bootstrap(bicubic[metric])) for metric, unit in METRICS]
    for arm, scores in found.items():
        result += [Row(LABELS[arm], setting, metric, unit, *bootstrap(scores[metric])) for metric, unit in METRICS]
        gain = scores["psnr_y"] - bicubic["psnr_y"]
        result.append(Row(LABELS[arm], setting, "gain_over_bicubic", "dB", *bootstrap(gain)))
        result.append(Row(LABELS[arm], setting, *sr.exact("params", "", parameters(arm))))
    for one, other in PAIRS:
        if one in found and other in found:
            difference = bootstrap(found[one]["psnr_y"] - found[other]["psnr_y"])
            result.append(Row(LABELS[one], setting, f"psnr_y minus that of {LABELS[other]}", "dB", *difference))
    return result


def parameters(arm: str) -> int:
    """Parameters of an arm's network."""
    (*_, last) = train_sr.plan(budget.get_config(arm))
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(last.model)))


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_string("workdir", None, "Folder of all runs.", required=True)
    flags.DEFINE_enum("card", "sr_budget", list(CARDS), "Which card, and so what to train.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of initialisation and patches.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Trains, scores and writes the card."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    start, args = time.monotonic(), flags.FLAGS
    arms, pairs, seeds = CARDS[args.card], sr.set5(sr.data_folder("sr/set5")), list(map(int, args.seeds))
    runs = {
        (arm, seed): score(arm, seed, pathlib.Path(args.workdir), pairs) for seed, arm in itertools.product(seeds, arms)
    }
    stack = lambda arm, metric: np.array([runs[arm, seed][metric] for seed in seeds])
    found = {arm: {metric: stack(arm, metric) for metric, _ in METRICS} for arm in arms}
    luma, _ = sr.scores(lambda low: np.asarray(imresize(low, 4)), pairs, 4)
    bicubic = {"psnr_y": np.array([list(luma.psnrs.values())]), "ssim_y": np.array([list(luma.ssims.values())])}
    paper = "RLFN: arXiv 2205.07514; IMDN: arXiv 1909.11856; DITN: arXiv 2308.02794"
    command = "JAXCOMP_DATA=FOLDER " + command_line("experiments.sr_budget", sys.argv[1:])
    device, minutes = f"{jax.devices()[0].device_kind}, jax {jax.__version__}", (time.monotonic() - start) / 60
    notes = (*DEPARTURES, f"Convention: {luma.convention}.")
    found_rows = rows(found, bicubic, "set5 x4")
    card = Card(args.card, paper, command, current_commit(), device, minutes, seeds, found_rows, notes)
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
