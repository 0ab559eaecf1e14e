"""Trains a chunk-wise autoregressive video DiT on procedural moving shapes, and exports it in float16.

python -m experiments.train_video_dit --config=configs/diffusion/video_dit.py --workdir=runs/video_dit [--export=FOLDER]

Diffusion forcing (Chen et al., NeurIPS 2024, arXiv 2407.01392): every chunk of a video has its own noise level. Data and
noise are drawn from (seed, step) alone; started again after a kill the run goes on from the newest checkpoint of `workdir`
and ends with the same parameters. Contact sheets and GIFs of samples are written to `workdir` on the way.
"""

import functools
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict, config_flags

from experiments import training
from experiments.cards import current_device
from experiments.runs import State, claim, launch
from experiments.video import write_sheet
from jaxcomp.data.embedded_video import save_video_dit
from jaxcomp.data.shapes import random_scene, render
from jaxcomp.io.files import write_json
from jaxcomp.models.video_dit import VideoDiT, VideoDiTConfig, patchify


class Batch(NamedTuple):
    """Clean tokens, noise, the noise level of every chunk, and labels (some of them "none")."""

    x0: Float[Array, "B G L C"]
    noise: Float[Array, "B G L C"]
    t: Float[Array, "B G"]
    label: Int[Array, "B"]


def draw(config: ConfigDict, model: VideoDiTConfig, key: Array) -> Batch:
    """A training batch."""
    scene_key, noise_key, time_key, label_key = jax.random.split(key, 4)
    scene = random_scene(scene_key, config.batch_size, model.size, config.moving_camera)
    x0 = patchify(render(scene, config.chunks * model.frames, model.size), model)
    dropped = jax.random.bernoulli(label_key, config.label_dropout, scene.kind.shape)
    label = jnp.where(dropped, model.classes, scene.kind)
    return Batch(x0, jax.random.normal(noise_key, x0.shape), draw_times(config, time_key, x0.shape[0]), label)


def draw_times(config: ConfigDict, key: Array, batch: int) -> Float[Array, "B G"]:
    """Noise levels: of independent chunks, or of chunks after a prefix that is almost clean."""
    keys, shape = jax.random.split(key, 4), (batch, config.chunks)
    t = jax.nn.sigmoid(config.time_mean + config.time_std * jax.random.normal(keys[0], shape))
    prefix = jax.random.randint(keys[1], (batch, 1), 1, config.chunks)
    prefix = jnp.where(jax.random.bernoulli(keys[2], config.clean_share, (batch, 1)), prefix, 0)
    clean = jax.random.uniform(keys[3], shape, maxval=config.clean_time)
    return jnp.where(jnp.arange(config.chunks)[None] < prefix, clean, t)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for all else, with clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
    )
    muon = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices_of_blocks,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), muon)


def _matrices_of_blocks(params: dict) -> dict:
    """Muon's axes of the stacked kernels [layer, in, out]; None elsewhere."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    chosen = lambda path, leaf: matrix if path[0].key == "blocks" and path[-1].key == "kernel" else None
    return jax.tree_util.tree_map_with_path(chosen, params)


def make_update(config: ConfigDict, model: VideoDiT, optimizer: optax.GradientTransformation) -> Callable:
    """Jitted `(params, average, opt_state, step) -> (params, average, opt_state, loss)`; the step is drawn from."""

    def loss_fn(params, batch: Batch) -> Float[Array, ""]:
        t = batch.t[:, :, None, None]
        velocity = model.apply({"params": params}, (1 - t) * batch.x0 + t * batch.noise, batch.t, batch.label)
        damping = jnp.minimum(jnp.maximum(t, model.config.min_time) / config.loss_floor, 1.0)
        return jnp.mean(jnp.square(damping * (velocity - (batch.noise - batch.x0))))

    @jax.jit
    def update(params, average, opt_state, step):
        batch = draw(config, model.config, jax.random.fold_in(jax.random.key(config.seed), step))
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax's Muon raises a float to an integer power
            updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - config.average_decay), opt_state, loss

    return update


def initial_state(config: ConfigDict, model: VideoDiT, optimizer: optax.GradientTransformation) -> State:
    """State before the first step."""
    tokens = jnp.zeros((1, 1, model.config.chunk_tokens, model.config.token_channels))
    params = jax.jit(model.init)(jax.random.key(config.seed), tokens, jnp.ones((1, 1)))["params"]
    return State(params, params, optimizer.init(params), np.zeros((), np.int32), np.zeros((), np.float32))


def steps(config: ConfigDict, model: VideoDiT, optimizer: optax.GradientTransformation, state: State) -> training.Steps:
    """Yields (state, loss) after each step from `state` to `config.steps`."""
    numbers = map(np.int32, range(int(state.step) + 1, config.steps + 1))
    return training.updates(make_update(config, model, optimizer), numbers, state, config.steps)


def train(config: ConfigDict, workdir: pathlib.Path) -> tuple[VideoDiT, State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings.
    """
    workdir = claim(workdir, config)
    model, optimizer = VideoDiT(VideoDiTConfig(**config.model)), make_optimizer(config)
    start = initial_state(config, model, optimizer)

    def draw_sheet(state: State, events: Any) -> dict:
        del events
        file = workdir / f"samples_{state.step:06d}"
        write_sheet(file, model, state.average, config.chunks, config.sheet_steps)
        return {}

    sheets = [training.Evaluation(config.sheet_every, draw_sheet)]
    return model, training.train(config, workdir, start, functools.partial(steps, config, model, optimizer), sheets)


def export(config: ConfigDict, folder: pathlib.Path, model: VideoDiT, state: State, command: str) -> None:
    """Writes the averaged weights in float16, and `training.json` with the settings."""
    save_video_dit(folder, model.config, state.average)
    record = {
        "command": command,
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "minutes": round(float(state.seconds) / 60, 1),
        "jax": jax.__version__,
        "device": current_device(),
    }
    write_json(folder / "training.json", record)


def main(argv) -> None:
    """Trains and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    args = flags.FLAGS
    model, state = train(args.config, pathlib.Path(args.workdir))
    if args.export:
        command = shlex.join(["python", "-m", "experiments.train_video_dit", *sys.argv[1:]])
        export(args.config, pathlib.Path(args.export), model, state, command)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/diffusion/video_dit.py", "What to train.", lock_config=True)
    flags.DEFINE_string("workdir", "runs/video_dit", "Checkpoints and samples.")
    flags.DEFINE_string("export", None, "Folder for the trained model; none is written without it.")
    launch(main)
