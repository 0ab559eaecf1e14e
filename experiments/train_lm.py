"""Trains a small Llama on English that every Python carries, and exports it as a Hugging Face folder.

python -m experiments.train_lm --config=configs/lm/train_default.py --workdir=runs/lm [--export=FOLDER]

Started again after a kill it goes on from the newest checkpoint of `workdir` and ends with the same parameters.
"""

import functools
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict, config_flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments import training
from experiments.cards import current_device
from experiments.runs import claim, launch
from experiments.training import Evaluation, Steps, updates
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
    return begin(
        model.init(jax.random.key(config.seed), jnp.zeros((1, config.context), jnp.int32))["params"], optimizer
    )


def begin(params: dict, optimizer: optax.GradientTransformation) -> State:
    """State before the first step from given params."""
    return State(params, optimizer.init(params), np.zeros((), np.int32), np.zeros((), np.float32))


def training_steps(
    config: ConfigDict, model: Llama, optimizer: optax.GradientTransformation, tokens, state: State
) -> Steps:
    """Yields (state, loss) after each step from `state` to `config.steps`."""
    batches = text.batches(tokens, config.context, config.batch_size, config.seed, start=int(state.step))
    return updates(make_update(model, optimizer), batches, state, config.steps)


def train(config: ConfigDict, workdir: pathlib.Path) -> tuple[Llama, Data, State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings.
    """
    workdir = claim(workdir, config)
    data = load_data(config, workdir)
    model = Llama(LlamaConfig(vocab_size=data.tokenizer.get_vocab_size(), **config.model))
    optimizer = make_optimizer(config)
    start = initial_state(config, model, optimizer)
    steps = functools.partial(training_steps, config, model, optimizer, data.train)
    measure = lambda state, _: {"calibration/perplexity": evaluate(model, state.params, data.calibration).ppl}
    return model, data, training.train(config, workdir, start, steps, [Evaluation(config.eval_every, measure)])


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
        "device": current_device(),
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
    launch(main)
