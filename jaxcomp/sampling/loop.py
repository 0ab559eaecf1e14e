"""One sampling run: solver, denoiser, cache policy and corrector around an explicit carry; three executors, one semantics.

    x --embed--> h --trunk, or what the policy kept of it--> h' --head--> F --solver--> o --corrector--> x of the next step

- "static": the plan is known beforehand. A skipped step holds no trunk; short runs are unrolled, long ones scanned by segments.
- "cond": one `lax.scan`, `lax.cond` around the trunk only, on one predicate for the whole batch. Do not `vmap` over it: a
  batched predicate becomes a select, and both branches run.
- "python": a host loop over jitted steps, for debugging and live progress.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.denoiser import Denoiser, call
from jaxcomp.sampling.policy import CachePolicy, uncached
from jaxcomp.sampling.solvers import LinearSolver, advance, coefficients

Executor = Literal["static", "cond", "python"]
UNROLL = 64  # "static" unrolls runs of at most so many steps
SCOPE = "jaxcomp_trunk"  # named scope of a trunk that runs; `explain` counts them
_UNCACHED, _UNCORRECTED = uncached(), Corrector()


class Carry(NamedTuple):
    """All that lives between two steps.

    Attributes:
      x: latents [B, ...].
      outputs: the last p - 1 outputs of the solver, newest first.
      cache: of the policy.
      correction: of the corrector.
      key: of the noise still to be drawn, None for deterministic solvers.
    """

    x: Array
    outputs: tuple[Array, ...]
    cache: Any
    correction: Any
    key: Any


class Trace(NamedTuple):
    """What a run did.

    Attributes:
      nfe: steps that ran the trunk.
      mask: True where the trunk ran.
    """

    nfe: Int[Array, ""]
    mask: Bool[Array, "T"]


jax.export.register_namedtuple_serialization(Trace, serialized_name="jaxcomp.sampling.Trace")


class Parts(NamedTuple):
    """The functions of a run."""

    denoiser: Denoiser
    policy: CachePolicy
    corrector: Corrector


class Inputs(NamedTuple):
    """The arrays of a run that no step changes."""

    params: Any
    cond: Any
    solver: LinearSolver


def sample(
    denoiser: Denoiser,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    solver: LinearSolver,
    *,
    policy: CachePolicy | None = None,
    corrector: Corrector | None = None,
    key: Array | None = None,
    executor: Executor = "static",
    on_step: Callable[[int, Array], None] | None = None,
) -> tuple[Float[Array, "B ..."], Trace]:
    """Integrates from noise to samples. Pure in its arrays: jit it, differentiate it, export it, shard x and cond over a mesh.

    Args:
      denoiser: the network.
      params: its parameters; may hold compressed leaves if the denoiser's functions are `compressed`.
      x: initial noise, of standard deviation `solver.init_std`.
      cond: what the denoiser takes, or None.
      solver: of `jaxcomp.sampling.solvers`.
      policy: which steps skip (parts of) the trunk; none by default.
      corrector: of outputs and states; none by default.
      key: PRNG key, for stochastic solvers.
      executor: see the module.
      on_step: "python" only: called with the step's number and the latents after it.

    Returns:
      (samples, trace).

    Raises:
      ValueError: an empty batch, latents that are not finite (where they are known), a stochastic solver without key, an unknown
        executor, a plan of another length or one that skips step 0, or a policy that decides while sampling with "static".
    """
    options = dict(policy=policy, corrector=corrector, key=key, executor=executor, on_step=on_step)
    carry, trace = integrate(denoiser, params, x, cond, solver, **options)
    return carry.x, trace


def integrate(
    denoiser: Denoiser,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    solver: LinearSolver,
    *,
    policy: CachePolicy | None = None,
    corrector: Corrector | None = None,
    key: Array | None = None,
    executor: Executor = "static",
    on_step: Callable[[int, Array], None] | None = None,
) -> tuple[Carry, Trace]:
    """`sample` that returns all of the last carry: what a policy or a corrector has recorded is in it."""
    parts = Parts(denoiser, policy or _UNCACHED, corrector or _UNCORRECTED)
    _check(x, solver, key, executor, on_step)
    plan = _plan(parts.policy, solver.steps, executor)
    inputs = Inputs(params, cond, solver)
    carry = _initial(parts, inputs, x, key if solver.stochastic else None)
    if executor == "python":
        carry, mask = _python(parts, inputs, carry, plan, on_step)
    else:
        carry, mask = (_static if executor == "static" else _cond)(parts, inputs, carry, plan)
    mask = jnp.asarray(mask)
    return carry, Trace(mask.sum(dtype=jnp.int32), mask)


def _check(x, solver: LinearSolver, key, executor: str, on_step) -> None:
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"x: expected latents with a leading batch axis of at least 1, found shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError(
            "x: expected finite latents, found NaN or infinity; check the noise or the encoder it comes from"
        )
    if solver.stochastic and key is None:
        raise ValueError(f"{solver.name} draws noise at its steps; pass key=jax.random.key(seed)")
    if executor not in ("static", "cond", "python"):
        raise ValueError(f"executor {executor!r} is unknown; expected 'static', 'cond' or 'python'")
    if on_step is not None and executor != "python":
        raise ValueError(f"on_step is called from the host: use executor='python', not {executor!r}")


def _plan(policy: CachePolicy, steps: int, executor: str) -> Any:
    plan = policy.plan(steps)
    if plan is None:
        if executor == "static":
            raise ValueError(
                "this policy decides while it samples; use executor='cond', or record its mask with freeze_plan for 'static'"
            )
        return None
    if isinstance(plan, jax.core.Tracer):
        if executor != "cond":
            raise ValueError(f"a traced plan needs executor='cond', not {executor!r}; close over a numpy mask instead")
    else:
        plan = np.asarray(plan, bool)
    if plan.shape != (steps,):
        raise ValueError(f"plan: expected one entry for each of the solver's {steps} steps, found shape {plan.shape}")
    if isinstance(plan, np.ndarray) and not plan[0]:
        raise ValueError("plan: step 0 must compute, there is nothing to reuse yet; found False")
    return plan


def _runner(parts: Parts, inputs: Inputs) -> Callable[..., Any]:
    return lambda h, c, around=call: parts.denoiser.trunk(inputs.params, h, c, around)


def _embed(parts: Parts, inputs: Inputs, x: Array, i: Any) -> tuple[Any, Any]:
    k = coefficients(inputs.solver, i, x.dtype)
    return parts.denoiser.embed(inputs.params, k.in_scale * x, jnp.broadcast_to(k.t, x.shape[:1]), inputs.cond)


def _initial(parts: Parts, inputs: Inputs, x: Array, key: Array | None) -> Carry:
    state = jax.eval_shape(lambda: parts.policy.init(_runner(parts, inputs), *_embed(parts, inputs, x, 0)))
    cache = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), state)
    outputs = (jnp.zeros_like(x),) * (inputs.solver.b.shape[1] - 1)
    return Carry(x, outputs, cache, parts.corrector.init(x), key)


def _before(parts: Parts, inputs: Inputs, carry: Carry, i: Any, decide: bool = True) -> tuple[Any, Any, Any, Any]:
    """(h, c, flag, cache): what a step knows before its trunk; flag is None without `decide`."""
    h, c = _embed(parts, inputs, carry.x, i)
    if not decide:
        return h, c, None, carry.cache
    flag, cache = parts.policy.decide(carry.cache, h, c, i)
    return h, c, flag | (jnp.asarray(i) == 0), cache


def _after(
    parts: Parts, inputs: Inputs, carry: Carry, i: Any, h: Any, c: Any, cache: Any, flag: Any, label: Any
) -> Carry:
    """The rest of a step. `flag` is a Python bool, or a traced one."""
    run = _runner(parts, inputs)

    def compute(cache, h):
        with jax.named_scope(f"{SCOPE}_{label}"):
            return parts.policy.compute(cache, run, h, c, i)

    def reuse(cache, h):
        return parts.policy.reuse(cache, run, h, c, i)

    if isinstance(flag, bool):
        h, cache = (compute if flag else reuse)(cache, h)
    else:
        h, cache = jax.lax.cond(flag, compute, reuse, cache, h)
    k = coefficients(inputs.solver, i, carry.x.dtype)
    out = k.skip * carry.x + k.gain * parts.denoiser.head(inputs.params, h, c).astype(carry.x.dtype)
    out, correction = parts.corrector.on_output(carry.correction, out, carry.x, i)
    outputs = (out, *carry.outputs)
    x, key = advance(k, carry.x, outputs), carry.key
    if key is not None:
        key, drawn = jax.random.split(key)
        x = x + k.noise * jax.random.normal(drawn, x.shape, x.dtype)
    x, correction = parts.corrector.on_state(correction, x, out, i)
    return Carry(x, outputs[:-1], cache, correction, key)


def _step(parts: Parts, inputs: Inputs, carry: Carry, i: Any, flag: Any, label: Any) -> tuple[Carry, Any]:
    h, c, decided, cache = _before(parts, inputs, carry, i, decide=flag is None)
    flag = decided if flag is None else flag
    return _after(parts, inputs, carry, i, h, c, cache, flag, label), flag


def _static(parts: Parts, inputs: Inputs, carry: Carry, plan: np.ndarray) -> tuple[Carry, np.ndarray]:
    for start, stop in segments(plan, unroll=len(plan) <= UNROLL):
        flag, label = bool(plan[start]), f"{start}_{stop}"
        if stop - start == 1:
            carry, _ = _step(parts, inputs, carry, start, flag, label)
        else:
            body = lambda carry, i, flag=flag, label=label: (_step(parts, inputs, carry, i, flag, label)[0], None)
            carry, _ = jax.lax.scan(body, carry, jnp.arange(start, stop))
    return carry, plan


def segments(plan: Bool[np.ndarray, "T"], unroll: bool) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a program: single steps, or the longest stretches of equal steps."""
    edges = np.arange(1, len(plan)) if unroll else np.flatnonzero(np.diff(plan)) + 1
    ends = [0, *edges.tolist(), len(plan)]
    return list(itertools.pairwise(ends))


def _cond(parts: Parts, inputs: Inputs, carry: Carry, plan: Any) -> tuple[Carry, Array]:
    steps = jnp.arange(inputs.solver.steps)
    if plan is None:
        return jax.lax.scan(lambda carry, i: _step(parts, inputs, carry, i, None, "cond"), carry, steps)
    if isinstance(plan, np.ndarray) and plan.all():
        return jax.lax.scan(lambda carry, i: (_step(parts, inputs, carry, i, True, "cond")[0], None), carry, steps)[
            0
        ], plan
    body = lambda carry, xs: _step(parts, inputs, carry, *xs, "cond")
    return jax.lax.scan(body, carry, (steps, jnp.asarray(plan).at[0].set(True)))


_before_jit = jax.jit(_before, static_argnames=("parts", "decide"))
_after_jit = jax.jit(_after, static_argnames=("parts", "flag", "label"))


def _python(parts: Parts, inputs: Inputs, carry: Carry, plan: Any, on_step: Any) -> tuple[Carry, list[bool]]:
    mask = []
    for i in range(inputs.solver.steps):
        h, c, decided, cache = _before_jit(parts, inputs, carry, jnp.asarray(i), decide=plan is None)
        mask.append(bool(decided if plan is None else plan[i]))
        carry = _after_jit(parts, inputs, carry, jnp.asarray(i), h, c, cache, flag=mask[-1], label="python")
        if on_step is not None:
            on_step(i, carry.x)
    return carry, mask
