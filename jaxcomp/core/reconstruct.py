"""`reconstruct`: the one block-wise optimisation loop of learned post-training methods (OmniQuant, ABQ-LLM, GQSA, ...)."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxcomp.core import progress


class Reconstruction(NamedTuple):
    """Result of `reconstruct`: the trained pytree and the mean loss of each epoch, float32 [epochs]."""

    trainable: Any
    losses: np.ndarray


def reconstruct(
    loss: Callable[[Any, Any, Any], jax.Array],
    trainable: Any,
    frozen: Any,
    data: Any,
    optimizer: optax.GradientTransformation,
    epochs: int,
    checkpoint_dir: str | pathlib.Path | None = None,
    name: str = "block",
) -> Reconstruction:
    """Minimises `loss(trainable, frozen, batch)` over `epochs` passes through `data`, one `lax.scan` per epoch.

    Blocks of equal shapes share one compilation as long as the same `loss` and `optimizer` objects are passed: what differs
    between blocks goes into `frozen`.

    Args:
      loss: scalar loss; hold nothing block-specific in its closure.
      trainable: float pytree, say learned clipping of one block.
      frozen: pytree passed through, say the block's params.
      data: pytree of arrays [steps, ...]; one slice is one optimisation step (inputs and targets of the block).
      optimizer: optax transformation.
      epochs: passes through the data.
      checkpoint_dir: where to keep the state after each epoch (Orbax, atomic). A run that was killed continues there with the
        same result as an uninterrupted one.
      name: shown in progress.

    Raises:
      ValueError: data is empty or its arrays disagree in their number of steps.
      FloatingPointError: the loss became NaN or infinite; the message says at which epoch.
    """
    steps = {len(x) for x in jax.tree.leaves(data)}
    if len(steps) != 1 or steps == {0}:
        raise ValueError(
            f"data must hold arrays with the same positive number of steps in front, found {sorted(steps)}"
        )
    trainable = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), trainable)  # drops weak types: one compilation
    state = (trainable, optimizer.init(trainable), jnp.full((epochs,), jnp.nan, jnp.float32))
    with _Checkpoints(checkpoint_dir) as manager:
        first = 0
        if manager is not None and (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            first = latest
        for epoch in progress.track(range(first, epochs), f"reconstruct {name}"):
            state = _epoch(loss, optimizer, state, frozen, data, epoch)
            if not np.isfinite(state[2][epoch]):
                raise FloatingPointError(f"{name}: loss is {state[2][epoch]} at epoch {epoch}; lower the learning rate")
            if manager is not None:
                manager.save(epoch + 1, args=ocp.args.StandardSave(state))
    return Reconstruction(state[0], np.asarray(state[2]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(loss, optimizer, state, frozen, data, epoch):
    def step(carry, batch):
        trainable, opt = carry
        value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer step count with floats
            updates, opt = optimizer.update(grads, opt, trainable)
        return (optax.apply_updates(trainable, updates), opt), value

    trainable, opt, losses = state
    (trainable, opt), values = jax.lax.scan(step, (trainable, opt), data)
    return trainable, opt, losses.at[epoch].set(values.mean())


class _Checkpoints:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        if self.folder is None:
            self.manager = None
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=False)
            self.manager = ocp.CheckpointManager(pathlib.Path(self.folder).absolute(), options=options)
        return self.manager

    def __exit__(self, *exc):
        if self.manager is not None:
            self.manager.close()
