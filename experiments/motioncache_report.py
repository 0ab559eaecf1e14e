"""The picture of MotionCache's card: quality by compute, motion weights of a sample, and the videos side by side."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from experiments.motioncache_worlds import Reference, World
from experiments.video import save_gif, to_bytes
from jaxcomp.io.files import replacing
from jaxcomp.models.video_dit import VideoDiTConfig, unpatchify
from jaxcomp.sampling.autoregressive import ladder, sample_chunks, tabled
from jaxcomp.sampling.cache.motioncache import MotionCacheConfig, motioncache

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = ("uniform", "TeaCache", "FlowCache", "MotionCache (SkyReels-V2 program)")


def curves(path: pathlib.Path, results: Mapping[Any, list[dict[str, Any]]], config: ConfigDict) -> None:
    """PSNR by the budget of tokens, one panel per world."""
    names = list(dict.fromkeys(world for world, _, _ in results))
    figure, axes = plt.subplots(
        1, len(names), figsize=(5.2 * len(names) + 3.2, 4.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        methods = list(dict.fromkeys(m for world, m, _ in results if world == name))
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for method in methods:
            if method not in SHOWN and not method.startswith(("MotionCache, x0", "oracle", "random")):
                continue
            values = [np.mean([r["psnr"] for r in results[name, method, b]]) for b in config.budgets]
            style = "--" if method.startswith(("oracle", "random")) else "-"
            axis.plot([100 * b for b in config.budgets], values, style, marker="o", label=method)
        axis.set(title=name, xlabel="computed tokens (%), at most", ylabel="PSNR to the uncached run (dB)")
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(path, figure)


def weight_maps(
    folder: pathlib.Path, world: World, found: Reference, size: VideoDiTConfig, config: MotionCacheConfig, tau: float
) -> None:
    """`motioncache_weights.png` and `motioncache.gif`: one video, its weights by step, and computed tokens; uncached beside."""
    schedule, policy = world.schedule, motioncache(tau, tabled(found.table), world.denoiser.frames, config)
    options = dict(policy=policy, ladder=ladder(world.x.shape[2], world.shares), reuse="output")
    record = lambda seen, state: state.weights
    one = jax.tree.map(lambda v: v[:1], (world.x, world.cond))
    run = jax.jit(
        lambda p, x, y: sample_chunks(world.denoiser, p, x, y, world.solver, schedule, record=record, **options)
    )
    x, trace = run(world.params, *one)
    pair = jnp.concatenate([jnp.asarray(found.x[:1]), x])
    save_gif(folder / "motioncache.gif", unpatchify(pair, size))
    figure = _maps(unpatchify(pair, size), *_last_chunk(trace, schedule, size), size)
    _save(folder / "motioncache_weights.png", figure)


def _last_chunk(trace: Any, schedule: Any, size: VideoDiTConfig) -> tuple[np.ndarray, np.ndarray]:
    """(weights, computed) of the last chunk: [n, F, side, side]."""
    rows = np.flatnonzero(schedule.step[:, -1] >= 0)
    shape = (len(rows), size.frames, size.size // size.patch, size.size // size.patch)
    return tuple(np.asarray(v)[rows, -1, 0, 0].reshape(shape) for v in (trace.recorded, trace.mask))


def _maps(pair: Float[Array, "2 T H W 3"], weights: np.ndarray, computed: np.ndarray, size: VideoDiTConfig) -> Any:
    steps = np.linspace(5, len(weights) - 1, 5).astype(int)
    figure, axes = plt.subplots(
        size.frames, 2 + 2 * len(steps), figsize=(1.3 * (2 + 2 * len(steps)), 1.4 * size.frames)
    )
    for f in range(size.frames):
        for column, video in enumerate(pair):
            axes[f, column].imshow(to_bytes(video[f - size.frames]))
        for k, step in enumerate(steps):
            axes[f, 2 + 2 * k].imshow(weights[step, f], vmin=0, vmax=1, cmap="magma")
            axes[f, 3 + 2 * k].imshow(computed[step, f], vmin=0, vmax=1, cmap="gray")
            axes[0, 2 + 2 * k].set_title(f"weights\nafter step {step}", fontsize=7)
            axes[0, 3 + 2 * k].set_title(f"computed\nat step {step}", fontsize=7)
    axes[0, 0].set_title("uncached", fontsize=7)
    axes[0, 1].set_title("MotionCache", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    return figure


def _save(path: pathlib.Path, figure: Any) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)
