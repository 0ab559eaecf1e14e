"""Recall: episodes ask what they told before; training resumes where it was killed; a trained decoder answers."""

import itertools

import jax
import numpy as np
import pytest

from configs.attention.recall import get_config
from experiments import recall, s2o_recall, train_recall
from jaxcomp.attention import s2o
from jaxcomp.models import Llama, LlamaConfig

SIZES = dict(span=6, prompt=2, symbols=(128, 256))
TEXT = np.arange(100) % 90


def places(tokens, passage):
    """Where a passage begins."""
    return [i for i in range(len(tokens) - len(passage) + 1) if (tokens[i : i + len(passage)] == passage).all()]


def test_lessons_ask_what_came_before():
    tokens, asked = recall.lesson(np.random.default_rng(0), TEXT, 64, 3, **SIZES)
    assert tokens.shape == (64,) and asked.sum() == 3 * 4 and (tokens < 90).sum() == 64 - 2 * 3 * 6
    starts = np.flatnonzero(np.diff(asked.astype(int), prepend=0) == 1) - 2
    for start in starts:
        first, again = places(tokens, tokens[start : start + 6])
        assert first + 6 <= again == start


def test_questions_put_passages_at_their_depths_and_ask_at_the_end():
    tokens, asked = recall.question(np.random.default_rng(0), TEXT, 64, [0.0, 0.5], **SIZES)
    assert len(tokens) == 64 and asked[-4:].all() and asked.sum() == 8
    firsts = {places(tokens, tokens[end - 6 : end])[0] for end in (58, 64)}
    assert firsts == {0, 6 + 20}  # of 40 tokens of text
    assert len(set(tokens[-12:])) == 12  # no symbol twice
    with pytest.raises(ValueError, match="shorter passages"):
        recall.question(np.random.default_rng(0), TEXT, 8, [0.5], **SIZES)


@pytest.fixture
def config():
    config = get_config()
    stages = ((32, 4, 1, 3), (48, 2, 1, 3))
    config.update(dict(stages=stages, steps=6, warmup_steps=1, checkpoint_every=2, log_every=6, span=8))
    config.model.update(dict(hidden_size=16, intermediate_size=16, num_layers=1, head_dim=8))
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
        yield config


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoint_and_is_exported(config, tmp_path, monkeypatch):
    model, whole = train_recall.train(config, tmp_path / "whole")
    steps = train_recall.training_steps
    with monkeypatch.context() as patch:
        patch.setattr(train_recall, "training_steps", lambda *args: itertools.islice(steps(*args), 5))
        train_recall.train(config, tmp_path / "killed")  # one step after the checkpoint, in the second stage
    _, resumed = train_recall.train(config, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    train_recall.export(config, tmp_path / "out", model, whole, "command")
    _, params = s2o_recall.load(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params, whole.params)


def test_every_step_has_its_own_batch_of_the_length_of_its_stage(config):
    text = recall.ascii_codes("calibration")
    first, second, third, last = (train_recall.batch(config, text, step) for step in (1, 2, 3, 4))
    assert first.tokens.shape == second.tokens.shape == third.tokens.shape == (4, 32) and last.tokens.shape == (2, 48)
    assert (first.tokens != second.tokens).any() and first.asked.sum() == 4 * 6
    np.testing.assert_array_equal(first.tokens, train_recall.batch(config, text, 1).tokens)


def test_answers_of_every_threshold_are_counted_per_question(config):
    config.update(dict(span=6, prompt=2))
    model = Llama(LlamaConfig(**config.model))
    decoder = model, model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    config.unlock()
    config.update(dict(depths=(0.0, 0.9), repeats=2))
    asked = s2o_recall.questions(config, 64)
    method = lambda t: s2o(threshold=t, segment=16, block_q=16, block_k=16).attend
    exact, sparse = s2o_recall.answers(decoder, method, (0.0, 0.9), asked)
    assert exact.recall.keys() == {"depth 0", "depth 0.9", s2o_recall.TOGETHER} and 0.9 < exact.density
    assert sparse.density < 0.9 and all(len(shares) == 2 for shares in sparse.recall.values())


def test_a_right_guess_is_counted_where_it_is_asked():
    episode = recall.Episode(np.array([1, 2, 3, 4, 5]), np.array([False, False, False, True, True]))
    assert s2o_recall.right(np.array([0, 0, 4, 0, 9]), episode) == 0.5
