"""The loop of trainings."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import training


class State(NamedTuple):
    """A training that only counts."""

    step: np.ndarray
    seconds: np.ndarray


def test_a_finished_training_asks_for_no_steps(tmp_path):
    config = ConfigDict(dict(steps=3, log_every=1, checkpoint_every=3))
    start, asked = State(np.zeros((), np.int32), np.zeros((), np.float32)), []

    def steps(state):
        asked.append(int(state.step))
        return training.updates(lambda batch: (jnp.float32(batch),), iter([1.0, 2.0, 3.0]), state, config.steps)

    for _ in range(2):
        assert int(training.train(config, tmp_path.resolve(), start, steps).step) == 3
    assert asked == [0]
