"""The small trained language model that ships with the package; `experiments/train_lm.py` made it."""

from typing import Any

import jax.numpy as jnp
import tokenizers

from jaxcomp.data.text import ASSETS
from jaxcomp.io.huggingface import load_pretrained, load_tokenizer
from jaxcomp.models.llama_config import LlamaConfig

FOLDER = ASSETS / "lm"


def load_embedded() -> tuple[LlamaConfig, dict[str, Any], tokenizers.Tokenizer]:
    """(config, float32 params of `Llama(config)`, tokenizer) of the shipped decoder; its numbers: `training.json`."""
    config, params = load_pretrained(FOLDER, dtype=jnp.float32)
    return config, params, load_tokenizer(FOLDER)
