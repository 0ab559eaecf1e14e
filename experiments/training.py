"""The loop of trainings that may be killed: it goes on from the newest checkpoint of its workdir, logs, evaluates and saves."""

import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress
from tensorboardX import SummaryWriter

State = Any  # a NamedTuple that ends in `step`, int32 [], and `seconds`, float32 [], of training so far
Steps = Iterator[tuple[State, Float[Array, ""]]]


class Evaluation(NamedTuple):
    """`measure(state, events)` after every `every` steps and the last: scalars by name; pictures go to `events` or to files."""

    every: int
    measure: Callable[[State, SummaryWriter], Mapping[str, float]]


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    start: State,
    steps: Callable[[State], Steps],
    evaluations: Iterable[Evaluation] = (),
) -> State:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one; a finished training asks for no steps.

    Args:
      config: has `steps`, `log_every` and `checkpoint_every`, in steps.
      workdir: absolute; takes checkpoints and TensorBoard events: every scalar, among them the mean loss since the last.
      start: the state before the first step.
      steps: yields (state, loss) after each step, or several, from a state to `config.steps`.
      evaluations: what else is logged.
    """
    console, losses, options = Console(soft_wrap=True), [], ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(workdir / "checkpoints", options=options) as manager,
        SummaryWriter(str(workdir)) as events,
    ):
        if manager.latest_step() is not None:
            start = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(start))
        if int(start.step) >= config.steps:
            return start
        state = start
        for state, loss in with_progress(console, steps(start), int(start.step), config.steps):
            step, scalars = int(state.step), {}
            due = lambda every, step=step: step % every == 0 or step == config.steps
            losses.append(loss)
            if due(config.log_every):
                scalars["train/loss"] = float(jnp.mean(jnp.stack(losses)))
                losses.clear()
            for every, measure in evaluations:
                scalars |= measure(state, events) if due(every) else {}
            for name, value in scalars.items():
                events.add_scalar(name, value, step)
                console.print(f"step {step}/{config.steps} {name} {value:.4g} ({state.seconds / 60:.1f} min)")
            if due(config.checkpoint_every):
                manager.save(step, args=ocp.args.StandardSave(state))
    return state


def updates(update: Callable, batches: Iterable, state: State, stop: int) -> Steps:
    """Yields (state, loss) after each step from `state` to `stop`; `update(*trained, batch) -> (*trained, loss)`."""
    *trained, start, seconds = state
    began = time.monotonic() - float(seconds)
    for step, batch in zip(range(int(start) + 1, stop + 1), batches, strict=False):
        *trained, loss = update(*trained, batch)
        yield type(state)(*trained, np.int32(step), np.float32(time.monotonic() - began)), loss


def with_progress(console: Console, steps: Steps, start: int, stop: int) -> Steps:
    """The same items, with a bar from step `start` to `stop` where the console is a terminal."""
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=stop, completed=start)
        for state, loss in steps:
            progress.update(task, completed=int(state.step))
            yield state, loss
