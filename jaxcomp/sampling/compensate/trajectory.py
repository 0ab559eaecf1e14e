"""Runs of two models from the same noise, as correctors of the sampling loop: record, force onto another run's states, fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.sampling.corrector import Corrector, chain
from jaxcomp.sampling.denoiser import Denoiser
from jaxcomp.sampling.loop import integrate
from jaxcomp.sampling.policy import CachePolicy, uncached
from jaxcomp.sampling.solvers import LinearSolver

Window = tuple[Array, ...]  # the newest outputs, newest first
_UNCACHED, _UNCORRECTED = uncached(), Corrector()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """What is sampled; a pytree of its params.

    Attributes:
      denoiser: with guidance, if there is any: correctors see guided outputs.
      params: dense or with compressed leaves.
      policy: of a cache.
      corrector: that acts before the ones fitted here, say the rectifier of a cache.
    """

    denoiser: Denoiser = dataclasses.field(metadata={"static": True})
    params: Any
    policy: CachePolicy = dataclasses.field(default=_UNCACHED, metadata={"static": True})
    corrector: Corrector = dataclasses.field(default=_UNCORRECTED, metadata={"static": True})


class Trajectory(NamedTuple):
    """All that a run went through.

    Attributes:
      states: latents before each step and after the last.
      outputs: of the solver's kind.
    """

    states: Float[Array, "T+1 B ..."]
    outputs: Float[Array, "T B ..."]


def check_noise(x: Float[Array, "B ..."]) -> None:
    """Raises ValueError for an empty batch, latents without channels or latents that are not finite."""
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"noises: expected [batch, ..., channels] with a batch of at least 1, found shape {x.shape}")
    if not bool(jnp.isfinite(x).all()):
        raise ValueError("noises: expected finite latents, found NaN or infinity; draw them with solver.initial")


def push(window: Window, output: Array) -> Window:
    """The window with a newer output in front, the oldest dropped."""
    return (output, *window)[: len(window)]


def empty(x: Array, size: int) -> Window:
    """A window of zeros."""
    return (jnp.zeros_like(x),) * size


def correction_after(model: Model, solver: LinearSolver, x: Array, cond: Any, corrector: Corrector, key=None) -> Any:
    """State of a corrector, which acts after the model's own, at the end of a run."""
    options = dict(policy=model.policy, corrector=chain(model.corrector, corrector), key=key, executor="cond")
    return integrate(model.denoiser, model.params, x, cond, solver, **options)[0].correction[1]


def trajectory(model: Model, solver: LinearSolver, x: Float[Array, "B ..."], cond: Any, key=None) -> Trajectory:
    """The run of a model from noise x, compiled; stochastic solvers draw the same noise for the same key.

    Raises:
      ValueError: as `check_noise` says, or a stochastic solver without key.
    """
    check_noise(x)
    return _record(model, solver, x, cond, None, key)


def shared_outputs(model: Model, solver: LinearSolver, states: Float[Array, "T+1 B ..."], cond: Any) -> Array:
    """Outputs of a model on the states of another one's trajectory, [T, B, ...]."""
    return _record(model, solver, states[0], cond, states, jax.random.key(0)).outputs


@jax.jit
@compressed
def _record(model: Model, solver: LinearSolver, x: Array, cond: Any, forced: Array | None, key) -> Trajectory:
    """With `forced` states every step starts from them, and what the solver would do is dropped."""

    def init(x):
        outputs = jnp.zeros((solver.steps, *x.shape), x.dtype)
        return Trajectory(jnp.concatenate([x[None], outputs]), outputs)

    def on_output(found, out, x, i):
        return out, found._replace(outputs=found.outputs.at[i].set(out))

    def on_state(found, x, out, i):
        x = x if forced is None else forced[i + 1]
        return x, found._replace(states=found.states.at[i + 1].set(x))

    return correction_after(model, solver, x, cond, Corrector(init, on_output, on_state), key)


class Step(NamedTuple):
    """What the fit of one step may use.

    Attributes:
      i: number of the step.
      outputs: of the quantized model, newest first.
      free: the state that the solver goes to without correction.
      target: the full-precision state there.
    """

    i: Array
    outputs: Window
    free: Float[Array, "B ..."]
    target: Float[Array, "B ..."]


class _Fit(NamedTuple):
    window: Window
    memory: Any
    found: Any  # coefficients of all steps, filled one by one


def closed_loop(
    quantized: Model,
    solver: LinearSolver,
    reference: Trajectory,
    cond: Any,
    blank: Any,
    *,
    on_state: Callable[[Any, Step], tuple[Array, Any, Any]],
    on_output: Callable[[Any, Array, Array], tuple[Array, Any]] = lambda memory, out, exact: (out, memory),
    memory: Any = (),
    window: int = 1,
    key=None,
) -> Any:
    """Fits step after step on the states that the corrected steps before it lead to: one pass is enough. Jit it.

    Args:
      quantized: the model to correct.
      solver: of both runs.
      reference: the full-precision trajectory; its first state is the noise.
      cond: of both runs.
      blank: coefficients of all steps, zeros, steps on the first axis.
      on_state: `on_state(memory, step) -> (corrected next state, memory, coefficients of the step)`.
      on_output: `on_output(memory, out, full-precision out) -> (corrected out, memory)`, before the solver's update.
      memory: of both before the first step.
      window: outputs that `on_state` sees.
      key: of a stochastic solver, the one of the reference.

    Returns:
      The coefficients.
    """

    def output(state, out, x, i):
        out, memory = on_output(state.memory, out, reference.outputs[i])
        return out, state._replace(window=push(state.window, out), memory=memory)

    def after(state, x, out, i):
        x, memory, new = on_state(state.memory, Step(i, state.window, x, reference.states[i + 1]))
        found = jax.tree.map(lambda all_steps, one: all_steps.at[i].set(one), state.found, new)
        return x, _Fit(state.window, memory, found)

    init = lambda x: _Fit(empty(x, window), memory, blank)
    x = reference.states[0]
    return correction_after(quantized, solver, x, cond, Corrector(init, output, after), key).found
