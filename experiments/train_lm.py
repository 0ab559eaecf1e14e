"""Trains a small Llama on English that every Python carries, and exports it as a Hugging Face folder.

python -m experiments.train_lm --config=configs/lm/train_default.py --workdir=runs/lm [--export=FOLDER]

Started again after a kill it goes on from the newest checkpoint of `workdir` and ends with the same parameters.
"""

import functools
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.progress import Progress
from tensorboardX import SummaryWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.runs import claim
from jaxcomp.data import text
from jaxcomp.evaluate.intervals import bootstrap_perplexity
from jaxcomp.evaluate.perplexity import Perplexity, perplexity
from jaxcomp.io.files import new_folder, replacing, write_json
from jaxcomp.io.huggingface import save_pretrained
from jaxcomp.models.llama import Llama
from jaxcomp.models.llama_config import LlamaConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to train.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/lm", "Checkpoints and logs.")
_EXPORT = flags.DEFINE_string("export", None, "Folder for the trained model; none is written without it.")


class Data(NamedTuple):
    """Tokenizer, training tokens and held-out windows."""

    tokenizer: Tokenizer
    train: Int[np.ndarray, "tokens"]
    calibration: Int[np.ndarray, "n length"]
    validation: Int[np.ndarray, "n length"]


class State(NamedTuple):
    """All that a resumed run needs; `step` is also the position in the data. `seconds` of training so far."""

    params: dict
    opt_state: optax.OptState
    step: Int[np.ndarray, ""]
    seconds: Float[np.ndarray, ""]


def train_tokenizer(corpus: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016): every string has a code, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def load_data(config: ConfigDict, workdir: pathlib.Path) -> Data:
    """Text as tokens; the tokenizer is trained once per `workdir`."""
    file = workdir / "tokenizer.json"
    if not file.exists():
        with replacing(file) as temporary:
            train_tokenizer(text.embedded_text("train"), config.vocab_size).save(str(temporary))
    tokenizer = Tokenizer.from_file(str(file))
    train, *held_out = (np.array(tokenizer.encode(text.embedded_text(split)).ids, np.int32) for split in text.SPLITS)
    validation, calibration = (text.token_windows(tokens, config.context) for tokens in held_out)
    return Data(tokenizer, train, calibration, validation)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and cosine decay; vectors (norm gains) do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
    )
    decayed = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    adamw = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def make_update(model: Llama, optimizer: optax.GradientTransformation) -> Callable:
    """Jitted `(params, opt_state, tokens) -> (params, opt_state, loss)`; loss is nats per token."""

    def loss_fn(params, tokens: Int[Array, "batch length"]) -> Float[Array, ""]:
        logits = model.apply({"params": params}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def update(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return update


def initial_state(config: ConfigDict, model: Llama, optimizer: optax.GradientTransformation) -> State:
    """State before the first step."""
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, config.context), jnp.int32))["params"]
    return State(params, optimizer.init(params), np.zeros((), np.int32), np.zeros((), np.float32))


def training_steps(
    config: ConfigDict, model: Llama, optimizer: optax.GradientTransformation, tokens, state: State
) -> Iterator[tuple[State, Float[Array, ""]]]:
    """Yields (state, loss) after each step from `state` to `config.steps`."""
    params, opt_state, start, seconds = state
    update = make_update(model, optimizer)
    batches = text.batches(tokens, config.context, config.batch_size, config.seed, start=int(start))
    began = time.monotonic() - float(seconds)
    for step in range(int(start) + 1, config.steps + 1):
        params, opt_state, loss = update(params, opt_state, next(batches))
        yield State(params, opt_state, np.int32(step), np.float32(time.monotonic() - began)), loss


def with_progress(console: Console, steps: Iterator, start: int, stop: int) -> Iterator:
    """The same items, with a bar from `start` to `stop` where the console is a terminal."""
    with Progress(console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(steps, total=stop, completed=start, description="training")


def train(config: ConfigDict, workdir: pathlib.Path) -> tuple[Llama, Data, State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings.
    """
    workdir = pathlib.Path(workdir).resolve()
    claim(workdir, config)
    data = load_data(config, workdir)
    model = Llama(LlamaConfig(vocab_size=data.tokenizer.get_vocab_size(), **config.model))
    optimizer = make_optimizer(config)
    start, losses, console = initial_state(config, model, optimizer), [], Console(soft_wrap=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as manager, SummaryWriter(str(workdir)) as log:
        if manager.latest_step() is not None:
            start = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(start))
        state, steps = start, training_steps(config, model, optimizer, data.train, start)
        for state, loss in with_progress(console, steps, int(start.step), config.steps):
            step = int(state.step)
            losses.append(loss)
            due = lambda every, step=step: step % every == 0 or step == config.steps
            if due(config.log_every):
                report(console, log, config, state, "train/loss", float(jnp.mean(jnp.stack(losses))))
                losses.clear()
            if due(config.eval_every):
                ppl = evaluate(model, state.params, data.calibration).ppl
                report(console, log, config, state, "calibration/perplexity", ppl)
            if due(config.checkpoint_every):
                manager.save(step, args=ocp.args.StandardSave(state))
    return model, data, state


def report(console: Console, log: SummaryWriter, config: ConfigDict, state: State, name: str, value: float) -> None:
    """One line and one TensorBoard scalar."""
    log.add_scalar(name, value, int(state.step))
    console.print(f"step {state.step}/{config.steps} {name} {value:.4f} ({state.seconds / 60:.1f} min)")


def evaluate(model: Llama, params: dict, windows: Int[np.ndarray, "n length"]) -> Perplexity:
    """Perplexity of the model on held-out windows."""
    return perplexity(_apply(model), params, windows)


@functools.cache
def _apply(model: Llama) -> Callable:
    return lambda params, tokens: model.apply({"params": params}, tokens)


def export(config: ConfigDict, folder: str, model: Llama, data: Data, state: State, command: str) -> None:
    """Writes the model in float16 with `training.json`, whose perplexities are those of the rounded weights.

    Raises:
      CheckpointError: `folder` holds files; the trained model stays in the workdir.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    validation = bootstrap_perplexity(evaluate(model, rounded, data.validation))
    record = {
        "command": command,
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps": int(state.step),
        "trained_tokens": int(state.step) * config.batch_size * config.context,
        "minutes": round(float(state.seconds) / 60, 1),
        "text_characters": {split: len(text.embedded_text(split)) for split in text.SPLITS},
        "text_tokens": {name: int(getattr(data, name).size) for name in text.SPLITS},
        "calibration_perplexity": evaluate(model, rounded, data.calibration).ppl,
        "validation_perplexity": validation._asdict(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    with new_folder(folder) as temporary:
        save_pretrained(temporary, model.config, params, tokenizer=data.tokenizer)
        write_json(temporary / "training.json", record)


def main(argv) -> None:
    """Trains, evaluates and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    config = _CONFIG.value
    model, data, state = train(config, pathlib.Path(_WORKDIR.value))
    if _EXPORT.value:
        command = shlex.join(["python", "-m", "experiments.train_lm", *sys.argv[1:]])
        export(config, _EXPORT.value, model, data, state, command)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
