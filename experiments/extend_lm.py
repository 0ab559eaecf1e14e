"""Extends the context of the embedded decoder by YaRN and continued training, and exports a Hugging Face folder.

python -m experiments.extend_lm --config=configs/attention/long_context.py --workdir=runs/lm_long --export=FOLDER

Started again after a kill it goes on from the newest checkpoint of `workdir`.
"""

import dataclasses
import functools
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from experiments import train_lm, training
from experiments.runs import claim, launch
from jaxcomp.data import embedded_text, load_embedded, token_windows
from jaxcomp.data.text import SPLITS
from jaxcomp.models import Llama, LlamaConfig, Rope, dot_product_attention


def extended(config: LlamaConfig, factor: float) -> LlamaConfig:
    """The same model with YaRN frequencies for `factor` times its context."""
    rope = Rope(config.rope.theta, "yarn", factor, original_max_len=config.max_len)
    return dataclasses.replace(config, rope=rope, max_len=round(config.max_len * factor))


def chunked_attention(rows: int):
    """A causal `attention_fn` that holds scores of `rows` queries at a time and recomputes them in the backward pass."""
    attend = jax.checkpoint(lambda q, k, v, mask: dot_product_attention(q, k, v, mask=mask))

    def attention(
        query: Float[Array, "B T H d"], key: Float[Array, "B T K d"], value: Float[Array, "B T K d"], **unused
    ) -> Float[Array, "B T H d"]:
        del unused
        length, chunks = query.shape[1], []
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            mask = np.arange(stop) <= np.arange(start, stop)[:, None]
            chunks.append(attend(query[:, start:stop], key[:, :stop], value[:, :stop], mask[None, None]))
        return jnp.concatenate(chunks, axis=1)

    return attention


def load(config: ConfigDict) -> tuple[Llama, train_lm.Data, dict]:
    """(model, tokens in windows of the new context, params of the embedded decoder)."""
    model_config, params, tokenizer = load_embedded()
    train, *held_out = (np.array(tokenizer.encode(embedded_text(split)).ids, np.int32) for split in SPLITS)
    validation, calibration = (token_windows(tokens, config.context) for tokens in held_out)
    model = Llama(extended(model_config, config.rope_factor), chunked_attention(config.query_chunk), remat=True)
    return model, train_lm.Data(tokenizer, train, calibration, validation), params


def train(config: ConfigDict, workdir: pathlib.Path) -> tuple[Llama, train_lm.Data, train_lm.State]:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Raises:
      ValueError: `workdir` holds a run with other settings.
    """
    workdir = claim(workdir, config)
    model, data, params = load(config)
    optimizer = train_lm.make_optimizer(config)
    steps = functools.partial(train_lm.training_steps, config, model, optimizer, data.train)
    return model, data, training.train(config, workdir, train_lm.begin(params, optimizer), steps)


def main(argv) -> None:
    """Trains, evaluates and exports."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file
    config, workdir, folder = (flags.FLAGS[name].value for name in ("config", "workdir", "export"))
    model, data, state = train(config, pathlib.Path(workdir))
    if folder:
        command = shlex.join(["python", "-m", "experiments.extend_lm", *sys.argv[1:]])
        train_lm.export(config, folder, model, data, state, command)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    launch(main)
