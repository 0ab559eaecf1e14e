"""The shipped decoder is small, loads as a Hugging Face folder and scores what its record says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.data import embedded_text, load_embedded, token_windows
from jaxcomp.data.embedded_model import FOLDER
from jaxcomp.evaluate import bootstrap_perplexity, perplexity
from jaxcomp.models.llama import Llama

CONFIG, PARAMS, TOKENIZER = load_embedded()
RECORD = json.loads((FOLDER / "training.json").read_text())


def test_model_is_small_and_its_shapes_suit_group_quantization():
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(leaf.size for leaf in jax.tree.leaves(PARAMS)) == RECORD["parameters"]
    assert {leaf.dtype for leaf in jax.tree.leaves(PARAMS)} == {jnp.dtype("float32")}
    inputs = {CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_heads * CONFIG.head_dim}
    assert all(size % 64 == 0 for size in inputs) and CONFIG.head_dim % 32 == 0
    assert CONFIG.num_kv_heads < CONFIG.num_heads


def score(split):
    windows = token_windows(TOKENIZER.encode(embedded_text(split)).ids, CONFIG.max_len)
    assert windows.size == RECORD["text_tokens"][split]
    return perplexity(lambda p, t: Llama(CONFIG).apply({"params": p}, t), PARAMS, windows)


def test_calibration_perplexity_is_the_recorded_one():
    np.testing.assert_allclose(score("calibration").ppl, RECORD["calibration_perplexity"], rtol=1e-3)


@pytest.mark.slow
def test_validation_perplexity_is_the_recorded_one():
    recorded = list(RECORD["validation_perplexity"].values())
    np.testing.assert_allclose(bootstrap_perplexity(score("validation")), recorded, rtol=1e-3)


def test_rounding_to_two_bits_destroys_it():
    windows = token_windows(TOKENIZER.encode(embedded_text("calibration")).ids, CONFIG.max_len)[::8]
    apply = lambda p, t: Llama(CONFIG).apply({"params": p}, t)
    two, eight = (
        perplexity(apply, jax.tree_util.tree_map_with_path(rounded(bits), PARAMS), windows) for bits in (2, 8)
    )
    float_ppl = perplexity(apply, PARAMS, windows).ppl
    assert two.ppl > 1.5 * float_ppl
    assert eight.ppl < 1.01 * float_ppl


def rounded(bits):
    """Min-max rounding of kernels, one grid per output channel."""

    def round_leaf(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        low, high = leaf.min(axis=0, keepdims=True), leaf.max(axis=0, keepdims=True)
        scale = (high - low) / (2**bits - 1)
        return jnp.round((leaf - low) / scale) * scale + low

    return round_leaf


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_loses_no_text(string):
    assert TOKENIZER.decode(TOKENIZER.encode(string).ids) == string


def test_tokenizer_fits_the_model():
    assert TOKENIZER.get_vocab_size() == CONFIG.vocab_size == PARAMS["embed"]["embedding"].shape[0]


@pytest.mark.parametrize("missing", ["seed", "steps", "minutes"])
def test_record_says_how_it_was_made(missing):
    record = RECORD | RECORD["config"]
    assert record[missing] >= 0 and "--export" in record["command"]
