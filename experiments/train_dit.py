r"""Trains a class-conditional diffusion transformer on the embedded digits or on MNIST.

python -m experiments.train_dit --config=configs/diffusion/digits_flow.py --workdir=runs/digits_flow \
    [--data_dir=FOLDER] [--export=FOLDER]

`--data_dir` holds vision/mnist, for configs whose data are "mnist". Started again after a kill it goes on from the newest
checkpoint of `workdir` and ends with the same parameters. `tensorboard --logdir=WORKDIR` shows the loss and sheets of samples.
"""

import functools
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict, config_flags
from tensorboardX import SummaryWriter

from experiments import training
from experiments.runs import State, claim, launch
from jaxcomp.data import digits as data
from jaxcomp.io.dit import save_dit
from jaxcomp.models.dit import DiT, init_params
from jaxcomp.models.dit_config import DiTConfig
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.denoiser import guided
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.network import network

OBJECTIVES = ("flow", "eps")


class Noisy(NamedTuple):
    """A training batch: what the network sees, and what it is to predict."""

    x: Float[Array, "B h w C"]
    t: Float[Array, "B"]
    target: Float[Array, "B h w C"]


def load_data(config: ConfigDict, data_dir: str | None) -> tuple[data.Labelled, data.Labelled]:
    """(training set, reference set of samples' classes), both of latents.

    Raises:
      ValueError: unknown data, MNIST without its folder, or damaged files.
    """
    if config.data == "digits":
        parts = data.digits("train"), data.digits("test")
    elif config.data == "mnist" and data_dir:
        parts = (data.mnist(data_dir),) * 2
    else:
        raise ValueError(f"data: expected 'digits', or 'mnist' with --data_dir, found {config.data!r}")
    return tuple(part._replace(images=data.to_latents(part.images)) for part in parts)


def add_noise(objective: str, x0: Float[Array, "B h w C"], key: Key[Array, ""]) -> Noisy:
    """Noises clean samples at random levels.

    "flow": x = (1 - s) x0 + s n, target n - x0, t = 1000 s (arXiv 2210.02747). "eps": x = alpha x0 + sigma n at the 1000
    steps of the cosine schedule, target n (arXiv 2102.09672).
    """
    time_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    wide = lambda v: v[:, None, None, None]
    if objective == "flow":
        s = jax.random.uniform(time_key, x0.shape[:1])
        return Noisy(wide(1 - s) * x0 + wide(s) * noise, 1000 * s, noise - x0)
    abar = jnp.asarray(np.cumprod(1 - schedules.cosine_betas()), jnp.float32)
    n = jax.random.randint(time_key, x0.shape[:1], 0, abar.size)
    x = wide(jnp.sqrt(abar[n])) * x0 + wide(jnp.sqrt(1 - abar[n])) * noise
    return Noisy(x, n.astype(jnp.float32), noise)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam with clipped gradients, warm-up and cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule, b2=config.beta2))


def make_run(config: ConfigDict, model: DiT, train: data.Labelled) -> Callable:
    """Jitted `(params, average, opt_state, steps int32 [n]) -> (params, average, opt_state, mean loss)` over n steps."""
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    optimizer, root = make_optimizer(config), jax.random.key(config.seed)

    def loss_fn(params, key):
        pick, noise, drop = jax.random.split(key, 3)
        index = jax.random.randint(pick, (config.batch_size,), 0, len(labels))
        dropped = jax.random.bernoulli(drop, config.label_dropout, index.shape)
        batch = add_noise(config.objective, images[index], noise)
        cond = jnp.where(dropped, data.NUM_CLASSES, labels[index])
        return jnp.mean(jnp.square(model.apply({"params": params}, batch.x, batch.t, cond) - batch.target))

    def update(state, step):
        params, average, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(root, step))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        rate = 1 - jnp.minimum(config.average_decay, (1.0 + step) / (10.0 + step))
        return (params, optax.incremental_update(params, average, rate), opt_state), loss

    @jax.jit
    def run(params, average, opt_state, steps):
        state, losses = jax.lax.scan(update, (params, average, opt_state), steps)
        return *state, losses.mean()

    return run


def initial_state(config: ConfigDict, model: DiT) -> State:
    """State before the first step."""
    params = init_params(model.config, jax.random.key(config.seed))
    return State(params, params, make_optimizer(config).init(params), np.zeros((), np.int32), np.zeros((), np.float32))


def train(config: ConfigDict, workdir: pathlib.Path, data_dir: str | None = None) -> tuple[DiT, State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings, or a setting is wrong.
    """
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, found {config.objective!r}")
    images, reference = load_data(config, data_dir)
    workdir = claim(workdir, config)
    model = DiT(DiTConfig(num_classes=data.NUM_CLASSES, **config.model))
    steps = functools.partial(training_steps, config, make_run(config, model, images))

    def draw_sheet(state: State, events: SummaryWriter) -> dict[str, float]:
        agreement, sheet = evaluate(config, model, state.average, reference)
        events.add_image("samples", sheet, int(state.step), dataformats="HWC")
        return {"samples/agreement": agreement}

    sheets = [training.Evaluation(config.eval_every, draw_sheet)]
    return model, training.train(config, workdir, initial_state(config, model), steps, sheets)


def training_steps(config: ConfigDict, run: Callable, state: State) -> training.Steps:
    """Yields (state, mean loss) after every `config.log_every` steps from `state` to `config.steps`."""
    while (left := config.steps - int(state.step)) > 0:
        state, loss = advance(run, state, min(config.log_every, left))
        yield state, loss


def advance(run: Callable, state: State, count: int) -> tuple[State, float]:
    """The state `count` steps later, and the mean loss."""
    began, start = time.monotonic(), int(state.step)
    *new, loss = run(*state[:3], jnp.arange(start, start + count))
    loss = float(loss)
    seconds = np.float32(float(state.seconds) + time.monotonic() - began)
    return State(*new, np.asarray(start + count, np.int32), seconds), loss


def make_solver(objective: str, steps: int) -> solvers.LinearSolver:
    """Euler for "flow", DDIM on the cosine schedule for "eps"."""
    if objective == "flow":
        return solvers.euler_flow(schedules.flow_grid(steps))
    return solvers.ddim(schedules.vp_grid(schedules.cosine_betas(), steps, "leading"))


@functools.partial(jax.jit, static_argnames=("model", "objective", "steps", "guidance"))
def draw(model: DiT, params, labels: Int[Array, "B"], key: Key[Array, ""], objective: str, steps: int, guidance: float):
    """Latents of the given classes."""
    solver = make_solver(objective, steps)
    denoiser = guided(network(model), guidance, jnp.int32(data.NUM_CLASSES))
    noise = solver.initial(key, (len(labels), *model.config.size, model.config.channels))
    return sample(denoiser, params, noise, labels, solver, executor="cond")[0]


def evaluate(config: ConfigDict, model: DiT, params: dict, reference: data.Labelled) -> tuple[float, np.ndarray]:
    """Share of samples whose nearest real image has their class, and a sheet with one row per class."""
    labels = np.repeat(np.arange(data.NUM_CLASSES, dtype=np.int32), config.samples_per_class)
    key = jax.random.key(config.seed + 1)
    latents = draw(model, params, labels, key, config.objective, config.sample_steps, config.guidance)
    found, real = np.asarray(latents).reshape(len(labels), -1), reference.images.reshape(len(reference.labels), -1)
    distance = np.square(real).sum(1) - 2 * found @ real.T  # up to a term of the sample alone
    agreement = float(np.mean(reference.labels[distance.argmin(1)] == labels))
    shown = latents.reshape(data.NUM_CLASSES, config.samples_per_class, *latents.shape[1:])[:, :10]
    images = data.to_images(np.asarray(shown).reshape(-1, *latents.shape[1:]))
    return agreement, data.contact_sheet(images, columns=shown.shape[1], zoom=max(1, 32 // images.shape[1]))


def export(config: ConfigDict, folder: str, model: DiT, state: State, reference: data.Labelled, command: str) -> None:
    """Writes the averaged model in float16 with `training.json`; the agreement is that of the rounded weights.

    Raises:
      CheckpointError: `folder` holds files; the trained model stays in the workdir.
    """
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.average)
    agreement, _ = evaluate(config, model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded), reference)
    record = {
        "command": command,
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(rounded)),
        "minutes": round(float(state.seconds) / 60, 1),
        "agreement": agreement,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    save_dit(folder, model.config, rounded, record)


def define_flags() -> None:
    """The flags of the script."""
    config_flags.DEFINE_config_file("config", None, "What to train.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder that holds vision/mnist; the digits need none.")
    flags.DEFINE_string("export", None, "Folder for the trained model; none is written without it.")
    flags.mark_flag_as_required("config")


def main(argv) -> None:
    """Trains, evaluates and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    args = flags.FLAGS
    model, state = train(args.config, pathlib.Path(args.workdir), args.data_dir)
    if args.export:
        command = shlex.join(["python", "-m", "experiments.train_dit", *sys.argv[1:]])
        export(args.config, args.export, model, state, load_data(args.config, args.data_dir)[1], command)


if __name__ == "__main__":
    define_flags()
    launch(main)
