"""Longer contexts: chunked attention is dense attention, training resumes where it was killed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.attention.long_context import get_config
from experiments import extend_lm, train_lm
from jaxcomp.data import load_embedded
from jaxcomp.models import dot_product_attention


def test_chunked_attention_and_its_gradient_are_dense():
    q, k, v = (
        jax.random.normal(key, (1, 40, n, 8)) for key, n in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2))
    )
    mask = jnp.tril(jnp.ones((40, 40), bool))[None, None]
    total = lambda attend: lambda q: (attend(q) ** 2).sum()
    chunked = jax.jit(jax.value_and_grad(total(lambda q: extend_lm.chunked_attention(16)(q, k, v))))(q)
    dense = jax.jit(jax.value_and_grad(total(lambda q: dot_product_attention(q, k, v, mask=mask))))(q)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_context_grows_and_the_low_frequencies_with_it():
    config = extend_lm.extended(load_embedded()[0], 8.0)
    assert config.max_len == 2048 and config.rope.kind == "yarn" and config.rope.original_max_len == 256


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
        _resumes(tmp_path, monkeypatch)


def _resumes(tmp_path, monkeypatch):
    config = get_config()
    config.update(dict(context=64, query_chunk=32, steps=4, checkpoint_every=2, warmup_steps=1, log_every=4))
    _, _, whole = extend_lm.train(config, tmp_path / "whole")
    steps = train_lm.training_steps
    with monkeypatch.context() as patch:
        patch.setattr(train_lm, "training_steps", lambda *args: itertools.islice(steps(*args), 3))
        extend_lm.train(config, tmp_path / "killed")  # one step after the checkpoint
    for folder in ("killed", "whole"):  # the second has nothing left to do
        _, _, state = extend_lm.train(config, tmp_path / folder)
        assert int(state.step) == 4
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(a, b)
