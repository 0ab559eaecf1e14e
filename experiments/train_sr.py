"""Trains a super-resolution network in stages, on images that ship with scikit-image or on a folder.

python -m experiments.train_sr --config=configs/sr/rlfn_tiny.py --workdir=runs/rlfn_tiny [--data_dir=FOLDER] [--export=FOLDER]

Every stage starts from the averaged weights of the one before, with a new optimizer and schedule (warm start of RLFN, Kong
et al., 2022); where its scale or width differs, what does not fit is drawn anew. Started again after a kill it goes on from
the newest checkpoint and ends with the same parameters. `tensorboard --logdir=WORKDIR` shows curves and images of every stage.
"""

import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Array, Float
from ml_collections import ConfigDict, config_flags
from tensorboardX import SummaryWriter

from experiments import sr, training
from experiments.runs import State, claim, launch
from experiments.training import Evaluation, Steps
from jaxcomp.core.transform import chain, compress, wrap_optax
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.restoration import Restoration, restoration, restorer
from jaxcomp.io import orbax
from jaxcomp.io.super_resolution import PUBLISHED, save_super_resolver
from jaxcomp.models.contrastive import contrastive_loss, shallow_features
from jaxcomp.sparsify import remove_zero_filters, rlfn_spaces, soft_filter_pruning

Restorer = Callable[[sr.Image], sr.Image]
_SHOWN = 160  # pixels of an image in TensorBoard


class Stage(NamedTuple):
    """One stage: its settings, its network, and how many steps come before it, which is its position in the data."""

    name: str
    settings: ConfigDict
    model: nn.Module
    before: int

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
    options, stages, before = dict(config.model), [], 0
    network = sr.NETWORKS[options.pop("network")]
    for name in sorted(config.stages):
        settings = config.stages[name]
        model = network(**options, scale=settings.scale)
        stages.append(Stage(name, settings, model, before))
        before += settings.steps
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
    return State(params, params, stage.optimizer.init(params), np.zeros((), np.int32), np.zeros((), np.float32))


def make_update(stage: Stage, config: ConfigDict) -> Callable:
    """Jitted `(params, average, opt_state, (low, high)) -> (params, average, opt_state, loss)`."""
    extract = shallow_features(jax.random.key(config.contrastive_seed), config.contrastive_features)
    loss_fn, optimizer = stage.loss(extract), stage.optimizer

    @jax.jit
    def update(params, average, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - config.average_decay), opt_state, loss

    return update


def steps(stage: Stage, config: ConfigDict, pairs: list[sr.Pair], state: State) -> Steps:
    """Yields (state, loss) after each step from `state` to the end of the stage."""
    s = stage.settings
    batches = sr.patches(pairs, s.scale, s.patch, s.batch, config.seed, stage.before + int(state.step))
    return training.updates(make_update(stage, config), batches, state, s.steps)


def train(config: ConfigDict, workdir: pathlib.Path, data_dir: str | None = None) -> Trained:
    """Trains all stages, each in its folder of `workdir`, from the newest checkpoints if there are some.

    Raises:
      ValueError: `workdir` holds a run with other settings, or a setting is wrong.
      ImageError: an image cannot be used.
    """
    stages, workdir = plan(config), pathlib.Path(workdir).resolve()
    claim(workdir, config)
    images = sr.bundled_images(sr.TRAINING) if data_dir is None else sr.folder_images(data_dir)
    held_out = {name: sr.centre(x, config.eval_size) for name, x in sr.bundled_images(sr.EVALUATION).items()}
    result = None
    for stage in stages:
        state = run_stage(stage, config, workdir / stage.name, images, held_out, result)
        result = stage.result(state)
    model = stages[-1].model.clone(channels=result["head"]["bias"].size)
    return Trained(model, result, *evaluate(restorer(model, result), model.scale, held_out))


def run_stage(
    stage: Stage,
    config: ConfigDict,
    workdir: pathlib.Path,
    images: Mapping[str, sr.Image],
    held_out: Mapping[str, sr.Image],
    previous: dict | None,
) -> State:
    """Runs a stage to its end, from the result of the previous one, with scores and images of what it restores."""

    def run_steps(state: State) -> Steps:
        pairs = [sr.degrade(image, stage.settings.scale) for image in images.values()]
        return steps(stage, config, pairs, state)

    def rate(state: State, events: SummaryWriter) -> dict[str, float]:
        del events
        return {"train/learning_rate": float(stage.schedule(int(state.step) - 1))}

    def score(state: State, events: SummaryWriter) -> dict[str, float]:
        run = restorer(stage.model, state.average)
        picture = gallery(run, stage.model.scale, held_out)
        events.add_image("evaluation", picture, int(state.step), dataformats="HWC")
        found, _ = evaluate(run, stage.model.scale, held_out)
        return {"evaluation/PSNR-Y": found.psnr, "evaluation/SSIM-Y": found.ssim}

    print(f"{stage.name}: {stage.settings.steps} steps at x{stage.settings.scale}")
    settings = ConfigDict(
        dict(steps=stage.settings.steps, log_every=config.log_every, checkpoint_every=config.checkpoint_every)
    )
    evaluations = [Evaluation(config.log_every, rate), Evaluation(config.eval_every, score)]
    return training.train(settings, workdir, begin(stage, config, previous), run_steps, evaluations)


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
