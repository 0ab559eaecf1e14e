"""Trains a small decoder to copy from its context, on ever longer episodes, and exports a Hugging Face folder.

python -m experiments.train_recall --config=configs/attention/recall.py --workdir=runs/recall --export=FOLDER

What it learns is an induction head (Olsson et al., 2022, arXiv 2209.11895): one layer marks every token with its predecessors,
the next looks for the place whose mark is the current text. Started again after a kill it goes on from the newest checkpoint.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import shlex
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from experiments import recall, train_lm, training
from experiments.extend_lm import chunked_attention
from experiments.runs import claim, launch
from jaxcomp.io.files import new_folder, write_json
from jaxcomp.io.huggingface import save_pretrained
from jaxcomp.models import Llama, LlamaConfig, Rope


def batch(config: ConfigDict, text: Int[np.ndarray, "T"], step: int) -> recall.Episode:
    """Episodes of one step, from the seed and its number alone; the stages of the config follow each other."""
    ends = np.cumsum([stage[-1] for stage in config.stages])
    length, sequences, passages, _ = config.stages[int(np.searchsorted(ends, step))]
    rng = np.random.default_rng((config.seed, step))
    sizes = dict(span=config.span, prompt=config.prompt, symbols=config.symbols)
    episodes = [recall.lesson(rng, text, length, passages, **sizes) for _ in range(sequences)]
    return recall.Episode(*(np.stack(part) for part in zip(*episodes, strict=True)))


def make_update(model: Llama, optimizer: optax.GradientTransformation) -> Callable:
    """Jitted `(params, opt_state, episode) -> (params, opt_state, nats per asked token)`."""

    def loss_fn(params, tokens: Int[Array, "B T"], asked: Bool[Array, "B T"]):
        logits = model.apply({"params": params}, tokens)[:, :-1]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return nats.mean(where=asked[:, 1:])

    @jax.jit
    def update(params, opt_state, episode):
        loss, grads = jax.value_and_grad(loss_fn)(params, *episode)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return update


def training_steps(
    config: ConfigDict, model: Llama, optimizer: optax.GradientTransformation, state: train_lm.State
) -> training.Steps:
    """Yields (state, loss) after each step from `state` to `config.steps`."""
    text = recall.ascii_codes("train")
    batches = (batch(config, text, step) for step in itertools.count(int(state.step) + 1))
    return training.updates(make_update(model, optimizer), batches, state, config.steps)


def train(config: ConfigDict, workdir: pathlib.Path) -> tuple[Llama, train_lm.State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings.
    """
    workdir = claim(workdir, config)
    size = LlamaConfig(**config.model, rope=Rope(theta=config.rope_theta))
    model, optimizer = Llama(size, chunked_attention(config.query_chunk)), train_lm.make_optimizer(config)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, config.span), jnp.int32))["params"]
    steps = functools.partial(training_steps, config, model, optimizer)
    return model, training.train(config, workdir, train_lm.begin(params, optimizer), steps)


def export(config: ConfigDict, folder: str, model: Llama, state: train_lm.State, command: str) -> None:
    """Writes the model in float16 with `training.json`.

    Raises:
      CheckpointError: `folder` holds files; the trained model stays in the workdir.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.params)
    record = {
        "command": command,
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "minutes": round(float(state.seconds) / 60, 1),
        "jax": jax.__version__,
    }
    with new_folder(folder) as temporary:
        save_pretrained(temporary, model.config, params)
        write_json(temporary / "training.json", record)


def main(argv) -> None:
    """Trains and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    config, workdir, folder = (flags.FLAGS[name].value for name in ("config", "workdir", "export"))
    model, state = train(config, pathlib.Path(workdir))
    if folder:
        export(config, folder, model, state, shlex.join(["python", "-m", "experiments.train_recall", *sys.argv[1:]]))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    launch(main)
