r"""Draws videos of moving shapes chunk by chunk with the video model of the package, with or without a token cache.

python -m experiments.sample_video --shape=disc --out=discs.gif
python -m experiments.sample_video --given --moving_camera --cache=motioncache --share=0.35 --out=sheet.png

`--given`: the first chunk is a real one, and the model goes on with it. `--share` is the largest share of the tokens that a cache
computes; its threshold is found on other videos. The sheet has one row per video, a GIF shows them side by side; with a cache
every video comes after the one of the full run on the same noise, and their PSNR is printed. Progress is shown video by video.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

import configs.diffusion.motioncache
from experiments.motioncache import FLOW, TEA, X0
from experiments.motioncache_worlds import Method, Reference, World, methods, reference, run, video_model, video_world
from experiments.runs import launch
from experiments.video import contact_sheet, save_gif, save_png
from jaxcomp.core.progress import track
from jaxcomp.data.embedded_video import FOLDER
from jaxcomp.data.shapes import KINDS
from jaxcomp.models.video_dit import unpatchify
from jaxcomp.sampling.cache.quality import mean_interval, quality

CALIBRATION = 4  # videos
THRESHOLDS = 200  # that are tried, by bisection
CACHES: Mapping[str, str] = {
    "uniform": "uniform",
    "teacache": TEA,
    "flowcache": FLOW,
    "motioncache": X0,
    "motioncache_skyreels": "MotionCache (SkyReels-V2 program)",
    "motioncache_magi": "MotionCache (MAGI-1 program)",
    "motioncache_paper": "MotionCache (paper's equations)",
}


def check(args: Any) -> None:
    """Raises ValueError for settings that do not fit."""
    if pathlib.Path(args.out).suffix not in (".png", ".gif"):
        raise ValueError(f"--out: expected a name that ends in .png or .gif, found {args.out!r}")
    if args.chunks <= args.given:
        raise ValueError("--chunks: with --given at least 2, one of them given")
    if not 0 < args.share <= 1 or not 0 <= args.floor <= 1:
        raise ValueError(f"expected --share in (0, 1] and --floor in [0, 1], found {args.share} and {args.floor}")


def worlds(args: Any, seed: int, videos: int) -> list[World]:
    """One world per video, so that progress can be shown; all of them share their programs."""
    video = configs.diffusion.motioncache.get_config().video
    video.update(videos=videos, given=int(args.given), chunks=args.chunks, steps=args.steps, stagger=args.steps // 3)
    kind = None if args.shape == "any" else KINDS.index(args.shape)
    world = video_world(ConfigDict(dict(video=video)), seed, args.moving_camera, folder(args), kind)
    return [world._replace(x=world.x[i : i + 1], cond=world.cond[i : i + 1]) for i in range(videos)]


def folder(args: Any) -> pathlib.Path:
    """Of the model."""
    return pathlib.Path(args.model) if args.model else FOLDER


def method_of(args: Any) -> Method:
    """The token cache."""
    known = methods(ConfigDict(dict(floors=(args.floor,), control_floors=())))
    return known[CACHES[args.cache].format(args.floor)]


def calibrate(args: Any, method: Method) -> tuple[float, np.ndarray]:
    """(threshold, distances of steps): the smallest threshold that keeps within the share on calibration videos.

    Raises:
      ValueError: none does, since the cache has more steps that always compute.
    """
    drawn = worlds(args, args.seed + 1, CALIBRATION)
    found = [reference(world) for world in track(drawn, "measuring distances")]
    table = np.mean([one.table for one in found], axis=0)
    within = lambda threshold: share_of(drawn, found, method, threshold, table) <= args.share
    if method.kind == "uniform":
        tried = range(1, args.steps + 1)
    else:
        tried = np.geomspace(1e-2, 4.0, THRESHOLDS) * table.sum()
    low, high = 0, len(tried) - 1
    if not within(tried[high]):
        share = share_of(drawn, found, method, tried[high], table)
        raise ValueError(
            f"--share: {args.cache} computes at least {share:.0%} of the tokens; give more, or more --steps"
        )
    while low < high:  # shares fall with the threshold
        middle = (low + high) // 2
        low, high = (low, middle) if within(tried[middle]) else (middle + 1, high)
    return float(tried[high]), table


def share_of(drawn: list[World], found: list[Reference], method: Method, threshold: float, table: np.ndarray) -> float:
    """Mean share of computed tokens."""
    pairs = zip(drawn, found, strict=True)
    return float(np.mean([run(w, f._replace(table=table), method, "output", threshold)[1] for w, f in pairs]))


def draw(args: Any) -> np.ndarray:
    """Tokens of all videos to show; prints what the cache did."""
    drawn = worlds(args, args.seed, args.videos)
    found = [reference(world) for world in track(drawn, "sampling")]
    if args.cache == "none":
        return np.concatenate([one.x for one in found])
    method = method_of(args)
    threshold, table = calibrate(args, method)
    pairs = track(list(zip(drawn, found, strict=True)), "sampling with the cache")
    runs = [(f.x, *run(w, f._replace(table=table), method, "output", threshold)) for w, f in pairs]
    made = slice(int(args.given), None)
    scores = [quality(x[:, made], full[:, made]).psnr[0] for full, x, _ in runs]
    psnr, share = mean_interval(np.array(scores)), np.mean([share for _, _, share in runs])
    print(f"{share:.0%} of the tokens computed, threshold {threshold:.3g}")
    print(f"PSNR to the full run {psnr.value:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}] over {len(runs)} videos")
    return np.concatenate([part for full, x, _ in runs for part in (full, x)])


def sample(args: Any) -> None:
    """Everything. Raises ValueError or CheckpointError for bad settings."""
    check(args)
    videos = unpatchify(draw(args), video_model(folder(args))[1])
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        save_gif(path, videos)
    else:
        save_png(path, contact_sheet(videos))
    print(path)


def main(argv) -> None:
    """Runs with one-line errors."""
    del argv
    sample(flags.FLAGS)


if __name__ == "__main__":
    flags.DEFINE_enum("shape", "any", ["any", *KINDS], "What moves.")
    flags.DEFINE_integer("videos", 4, "How many.", lower_bound=1)
    flags.DEFINE_integer("chunks", 3, "Chunks of a video, those given included.", lower_bound=1)
    flags.DEFINE_integer("steps", 24, "Steps of the solver, for every chunk.", lower_bound=3)
    flags.DEFINE_boolean("given", False, "Go on with a chunk that is given.")
    flags.DEFINE_boolean("moving_camera", False, "Of given chunks.")
    flags.DEFINE_enum("cache", "none", ["none", *CACHES], "Token cache.")
    flags.DEFINE_float("share", 0.4, "Largest share of the tokens that a cache computes.")
    flags.DEFINE_float("floor", 0.3, "Weight of still tokens in motioncache.")
    flags.DEFINE_integer("seed", 0, "Of scenes and noise.")
    flags.DEFINE_string(
        "model", "", "Folder that experiments.train_video_dit exported; the one of the package by default."
    )
    flags.DEFINE_string("out", "video.gif", "PNG of all frames, or GIF.")
    launch(main)
