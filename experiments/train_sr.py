"""Trains a super-resolution network in stages, on images that ship with scikit-image or on a folder.

python -m experiments.train_sr --config=configs/sr/rlfn_tiny.py --workdir=runs/rlfn_tiny [--data_dir=FOLDER] [--export=FOLDER]

Every stage starts from the averaged weights of the one before, with a new optimizer and schedule (warm start of RLFN, Kong
et al., 2022); where its scale or width differs, what does not fit is drawn anew. Started again after a kill it goes on from
the newest checkpoint of `workdir` and ends with the same parameters. `tensorboard --logdir=WORKDIR` shows curves and images.
"""

import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags, logging
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from tensorboardX import SummaryWriter

from experiments import sr
from experiments.runs import claim, launch
from jaxcomp.core.progress import track
from jaxcomp.core.transform import chain, compress, wrap_optax
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.restoration import Restoration, restoration, restorer
from jaxcomp.io import orbax
from jaxcomp.io.super_resolution import PUBLISHED, save_super_resolver
from jaxcomp.models.contrastive import contrastive_loss, shallow_features
from jaxcomp.sparsify import remove_zero_filters, rlfn_spaces, soft_filter_pruning

Restorer = Callable[[sr.Image], sr.Image]
_SHOWN = 160  # pixels of an image in TensorBoard


class State(NamedTuple):
    """All that a resumed run needs; `step` counts over all stages and is the position in the data."""

    params: dict
    average: dict
    opt_state: optax.OptState
    step: Int[np.ndarray, ""]


class Stage(NamedTuple):
    """One stage: its settings, its network, and the global steps (first, last] that it takes."""

    name: str
    settings: ConfigDict
    model: nn.Module
    first: int
    last: int

    @property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step within the stage: "cosine" to zero, or "step", halved every `halve_every`."""
        s = self.settings
        if s.schedule == "cosine":
            return optax.cosine_decay_schedule(s.learning_rate, s.steps)
        return optax.exponential_decay(s.learning_rate, s.halve_every, 0.5, staircase=True)

    @property
    def pruning(self):
        """Soft filter pruning of RLFN at the stage's rate."""
        return soft_filter_pruning(rlfn_spaces(self.model.num_blocks), self.settings.prune_rate)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam; with a `prune_rate` filters are zeroed softly after every `prune_every` steps."""
        adam = optax.adam(self.schedule)
        return wrap_optax(adam, self.pruning, self.settings.prune_every) if self.settings.prune_rate else adam

    def loss(self, extract: Callable) -> Callable[[dict, Array, Array], Float[Array, ""]]:
        """`(params, low, high) -> loss` on images in [0, 1]."""
        s, span = self.settings, self.model.data_range
        upscale = jax.vmap(functools.partial(imresize, scale=s.scale))

        def loss(params, low, high):
            found = self.model.apply({"params": params}, low * span) / span
            value = jnp.mean(jnp.square(found - high) if s.loss == "l2" else jnp.abs(found - high))
            if s.contrastive_weight:
                value += s.contrastive_weight * contrastive_loss(extract, found, high, upscale(low))
            return value

        return loss

    def result(self, state: State) -> dict:
        """The averaged weights; where the stage prunes, without the pruned filters."""
        if not self.settings.prune_rate:
            return state.average
        removal = remove_zero_filters(rlfn_spaces(self.model.num_blocks))
        return compress(chain(self.pruning, removal), state.average)[0]


class Trained(NamedTuple):
    """A trained network, its score on the evaluation images, and bicubic's."""

    model: nn.Module
    params: dict
    score: Restoration
    bicubic: Restoration


def plan(config: ConfigDict) -> list[Stage]:
    """The stages in the order of their names.

    Raises:
      ValueError: an unknown network, loss or schedule, or a pruning stage of another network than RLFN.
    """
    check(config)
    options, stages, first = dict(config.model), [], 0
    network = sr.NETWORKS[options.pop("network")]
    for name in sorted(config.stages):
        settings = config.stages[name]
        model = network(**options, scale=settings.scale)
        stages.append(Stage(name, settings, model, first, first + settings.steps))
        first += settings.steps
        if settings.prune_rate:  # what remains of the trunk afterwards
            options["channels"] = round((1 - settings.prune_rate) * model.channels)
    return stages


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that no stage can have."""
    allowed = [("model.network", config.model.network, tuple(sr.NETWORKS))]
    for name, settings in config.stages.items():
        allowed += [(f"stages.{name}.loss", settings.loss, ("l1", "l2"))]
        allowed += [(f"stages.{name}.schedule", settings.schedule, ("cosine", "step"))]
        if settings.prune_rate:
            allowed += [(f"stages.{name}.prune_rate: network", config.model.network, ("rlfn",))]
    for what, found, expected in allowed:
        if found not in expected:
            raise ValueError(f"{what}: expected one of {', '.join(expected)}, found {found!r}")


def begin(stage: Stage, config: ConfigDict, previous: dict | None) -> State:
    """State before the first step of a stage; leaves of the previous one are kept where they fit."""
    params = jax.jit(stage.model.init)(jax.random.key(config.seed), jnp.zeros((1, 16, 16, 3)))["params"]
    if previous is not None:
        params = jax.tree.map(lambda old, new: old if old.shape == new.shape else new, previous, params)
    return State(params, params, stage.optimizer.init(params), np.asarray(stage.first, np.int32))


def make_update(stage: Stage, config: ConfigDict, optimizer: optax.GradientTransformation) -> Callable:
    """Jitted `(params, average, opt_state, low, high) -> (params, average, opt_state, loss)`."""
    extract = shallow_features(jax.random.key(config.contrastive_seed), config.contrastive_features)
    loss_fn = stage.loss(extract)

    @jax.jit
    def update(params, average, opt_state, low, high):
        loss, grads = jax.value_and_grad(loss_fn)(params, low, high)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - config.average_decay), opt_state, loss

    return update


def steps(stage: Stage, config: ConfigDict, pairs: list[sr.Pair], state: State) -> Iterator[tuple[State, Array]]:
    """Yields (state, loss) after each step from `state` to the end of the stage."""
    update = make_update(stage, config, stage.optimizer)
    s, start = stage.settings, int(state.step)
    batches = sr.patches(pairs, s.scale, s.patch, s.batch, config.seed, start)
    params, average, opt_state, _ = state
    for step in track(range(start + 1, stage.last + 1), stage.name):
        params, average, opt_state, loss = update(params, average, opt_state, *next(batches))
        yield State(params, average, opt_state, np.asarray(step, np.int32)), loss


def train(config: ConfigDict, workdir: pathlib.Path, data_dir: str | None = None) -> Trained:
    """Trains all stages, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings, or a setting is wrong.
      ImageError: an image cannot be used.
    """
    stages, workdir = plan(config), pathlib.Path(workdir).resolve()
    claim(workdir, config)
    images = sr.bundled_images(sr.TRAINING) if data_dir is None else sr.folder_images(data_dir)
    held_out = {name: sr.centre(x, config.eval_size) for name, x in sr.bundled_images(sr.EVALUATION).items()}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as manager, SummaryWriter(str(workdir)) as log:
        state = restore(manager, stages, config)
        for i, stage in enumerate(stages):
            if state is not None and int(state.step) >= stage.last:
                continue
            if state is None or int(state.step) == stage.first:
                state = begin(stage, config, stages[i - 1].result(state) if state else None)
            state = run_stage(stage, config, images, held_out, state, manager, log)
    params = stages[-1].result(state)
    model = stages[-1].model
    model = model.clone(channels=params["head"]["bias"].size)
    return Trained(model, params, *evaluate(restorer(model, params), model.scale, held_out))


def restore(manager: ocp.CheckpointManager, stages: list[Stage], config: ConfigDict) -> State | None:
    """The newest checkpoint, in the form of the stage that wrote it."""
    if (step := manager.latest_step()) is None:
        return None
    stage = next(stage for stage in stages if stage.first < step <= stage.last)
    return manager.restore(step, args=ocp.args.StandardRestore(begin(stage, config, None)))


def run_stage(
    stage: Stage,
    config: ConfigDict,
    images: Mapping[str, sr.Image],
    held_out: Mapping[str, sr.Image],
    start: State,
    manager: ocp.CheckpointManager,
    log: SummaryWriter,
) -> State:
    """Runs a stage to its end, with checkpoints, scalars and images."""
    pairs = [sr.degrade(image, stage.settings.scale) for image in images.values()]
    console, losses = Console(soft_wrap=True), []
    for state, loss in steps(stage, config, pairs, start):
        step = int(state.step)
        losses.append(loss)
        due = lambda every, step=step: step % every == 0 or step == stage.last
        scalars = {}
        if due(config.log_every):
            rate = stage.schedule(step - stage.first - 1)
            scalars = {"train/loss": float(jnp.mean(jnp.stack(losses))), "train/learning_rate": float(rate)}
            losses.clear()
        if due(config.eval_every):
            run = restorer(stage.model, state.average)
            score, _ = evaluate(run, stage.model.scale, held_out)
            scalars |= {"evaluation/PSNR-Y": score.psnr, "evaluation/SSIM-Y": score.ssim}
            log.add_image("evaluation", gallery(run, stage.model.scale, held_out), step, dataformats="HWC")
        for name, value in scalars.items():
            log.add_scalar(name, value, step)
        if scalars:
            text = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            console.print(f"{stage.name} step {step}/{stage.last} {text}")
        if due(config.checkpoint_every):
            manager.save(step, args=ocp.args.StandardSave(state))
    return state


def evaluate(run: Restorer, scale: int, images: Mapping[str, sr.Image]) -> tuple[Restoration, Restoration]:
    """Scores on Y of the network and of bicubic."""
    pairs = [(name, *sr.degrade(image, scale)) for name, image in images.items()]
    bicubic = lambda low: np.asarray(imresize(low, scale))
    score = lambda restore: restoration(restore, pairs, border=scale, channel="y")
    return score(run), score(bicubic)


def gallery(run: Restorer, scale: int, images: Mapping[str, sr.Image]) -> sr.Image:
    """One row per image: bicubic, the network, the truth."""
    rows = []
    for image in images.values():
        low, high = sr.degrade(sr.centre(image, _SHOWN), scale)
        rows.append(np.concatenate([np.asarray(imresize(low, scale)), run(low), high], axis=1))
    return np.concatenate(rows)


def define_flags() -> None:
    """The flags of the script."""
    config_flags.DEFINE_config_file("config", None, "What to train.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder of training images; default: those that ship with scikit-image.")
    flags.DEFINE_string("export", None, "Folder for the trained params (Orbax); none is written without it.")
    flags.DEFINE_string("safetensors", None, "File for them in the layout of --save_as, float16.")
    flags.DEFINE_enum("save_as", None, list(PUBLISHED), "Whose names and layout --safetensors has.")
    flags.mark_flag_as_required("config")


def main(argv) -> None:
    """Trains, scores and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    args = flags.FLAGS
    if (args.safetensors is None) != (args.save_as is None):
        raise ValueError("--safetensors and --save_as go together")
    done = train(args.config, pathlib.Path(args.workdir), args.data_dir)
    print(f"PSNR {done.score.psnr:.3f} dB, SSIM {done.score.ssim:.4f} (bicubic {done.bicubic.psnr:.3f} dB)")
    print(done.score.convention)
    command = shlex.join(["python", "-m", "experiments.train_sr", *sys.argv[1:]])
    if args.export:
        psnr = {"network": done.score.psnr, "bicubic": done.bicubic.psnr}
        orbax.save(args.export, done.params, {"command": command, "config": args.config.to_dict(), "psnr_y": psnr})
    if args.safetensors:
        save_super_resolver(args.save_as, args.safetensors, done.params, "float16", {"command": command})


if __name__ == "__main__":
    define_flags()
    launch(main)
