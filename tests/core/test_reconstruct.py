"""The block-wise optimisation loop: it learns, compiles once, and survives a kill."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.core import progress
from jaxcomp.core.reconstruct import reconstruct
from jaxcomp.formats import FakeQuantizedArray, Grid, Layout

TRACES = []


def clip_loss(clip_logits, frozen, batch):
    """Learned weight clipping of one linear block (OmniQuant's LWC) against its float output."""
    TRACES.append(1)
    x, y = batch
    layout = Layout.of((16, 16), (0,))
    leaf = FakeQuantizedArray(frozen, jax.nn.sigmoid(clip_logits), None, layout, Grid(2, symmetric=False))
    return ((x @ leaf.materialise() - y) ** 2).mean()


def problem(seed):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_t(3, size=(16, 16)).astype(np.float32))  # heavy tails: clipping pays
    x = jnp.asarray(rng.normal(size=(4, 32, 16)).astype(np.float32))
    return w.T, (x, x @ w)


OPTIMIZER = optax.adam(5e-2)
START = jnp.full((16, 1, 2), 4.0)


def test_learned_clipping_beats_min_max_and_equal_blocks_share_a_compilation():
    TRACES.clear()
    for seed in range(3):
        frozen, data = problem(seed)
        result = reconstruct(clip_loss, START, frozen, data, OPTIMIZER, epochs=40)
        assert result.losses.shape == (40,) and result.losses[-1] < 0.95 * result.losses[0]
    assert len(TRACES) == 1, "blocks of equal shapes must not be compiled again"


def test_killed_run_continues_to_the_same_result(tmp_path, monkeypatch):
    frozen, data = problem(0)
    whole = reconstruct(clip_loss, START, frozen, data, OPTIMIZER, epochs=6)

    def killed_after_two(items, stage):
        for i, item in enumerate(items):
            if i == 2:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress, "track", killed_after_two)
        reconstruct(clip_loss, START, frozen, data, OPTIMIZER, epochs=6, checkpoint_dir=tmp_path)
    resumed = reconstruct(clip_loss, START, frozen, data, OPTIMIZER, epochs=6, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(resumed.trainable, whole.trainable)
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_bad_data_and_divergence_are_errors():
    frozen, (x, y) = problem(0)
    with pytest.raises(ValueError, match="same positive number of steps"):
        reconstruct(clip_loss, START, frozen, (x, y[:2]), OPTIMIZER, epochs=1)
    with pytest.raises(FloatingPointError, match="q: loss is nan at epoch 0; lower the learning rate"):
        reconstruct(clip_loss, START * jnp.nan, frozen, (x, y), OPTIMIZER, epochs=1, name="q")
