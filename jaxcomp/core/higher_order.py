"""Compressed leaves inside `jit`, `remat`, `scan`, `while` and `cond`: one rule each, registered once.

Operands without compressed leaves are bound untouched. Otherwise the body runs on the leaves themselves, on a tape of its own,
whose statistics leave the body as additional outputs. Carries and branch results are materialised: their structure must not
change between iterations or branches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import primitives as P
from jax.typing import ArrayLike

from jaxcomp._compat import close_jaxpr, split_scan_operands
from jaxcomp.core import tape
from jaxcomp.core.leaf import materialise

_OURS = {"precedence": 1}  # above the rules for the same primitives that quax ships: those keep no tape


def _has_leaves(values) -> bool:
    return any(isinstance(v, quax.Value) for v in values)


def _run(jaxpr, values) -> list:
    return quax.quaxify(jaxpr_as_fun(jaxpr))(*values)


def _run_taped(jaxpr, values) -> tuple[list, tape.Stats, list[tape.Event]]:
    """Runs a body with dense results; returns (results, statistics, events)."""
    with tape.recording() as inner:
        out = [materialise(x, "result") for x in _run(jaxpr, values)]
    return out, inner.stats, inner.events


@quax.register(P.jit_p, **_OURS)
def _jit(*args: ArrayLike | quax.ArrayValue, jaxpr, **params: Any):
    if not _has_leaves(args):
        return P.jit_p.bind(*args, jaxpr=jaxpr, **params)
    return _run(jaxpr, args)


@quax.register(P.remat_p, **_OURS)
def _remat(*args: ArrayLike | quax.ArrayValue, jaxpr, prevent_cse, policy, **params: Any):
    if not _has_leaves(args):
        return P.remat_p.bind(*args, jaxpr=jaxpr, prevent_cse=prevent_cse, policy=policy, **params)
    events = []

    def body(values):
        out, stats, seen = _run_taped(close_jaxpr(jaxpr), values)
        events[:] = seen
        return out, stats

    out, stats = jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)(list(args))
    tape.absorb(events, stats)
    return out


@quax.register(P.scan_p, **_OURS)
def _scan(*args: ArrayLike | quax.ArrayValue, jaxpr, length, reverse, unroll, **params: Any):
    if not _has_leaves(args):
        return P.scan_p.bind(*args, jaxpr=jaxpr, length=length, reverse=reverse, unroll=unroll, **params)
    consts, carry, xs = split_scan_operands(args, params)
    shared = {v.name for v in consts if hasattr(v, "name")}
    events = []

    def body(carry, xs):
        out, stats, seen = _run_taped(jaxpr, [*consts, *carry, *xs])
        events[:] = seen
        return out[: len(carry)], (out[len(carry) :], stats)

    carry = [materialise(c, "scan carry") for c in carry]
    carry, (ys, stats) = jax.lax.scan(body, carry, xs, length=length, reverse=reverse, unroll=unroll)
    stats = {leaf: tape.reduce_leading(s) if leaf in shared else s for leaf, s in stats.items()}
    tape.absorb(events, stats)
    return [*carry, *ys]


@quax.register(P.while_p, **_OURS)
def _while(*args: ArrayLike | quax.ArrayValue, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts):
    if not _has_leaves(args):
        return P.while_p.bind(
            *args,
            cond_jaxpr=cond_jaxpr,
            cond_nconsts=cond_nconsts,
            body_jaxpr=body_jaxpr,
            body_nconsts=body_nconsts,
        )
    n = cond_nconsts + body_nconsts
    cond_consts, body_consts, carry = args[:cond_nconsts], args[cond_nconsts:n], args[n:]
    events = []

    def body(carry):
        out, _, seen = _run_taped(body_jaxpr, [*body_consts, *carry])  # the number of turns is unknown: no statistics
        events[:] = seen
        return out

    carry = [materialise(c, "while carry") for c in carry]
    out = jax.lax.while_loop(lambda c: _run_taped(cond_jaxpr, [*cond_consts, *c])[0][0], body, carry)
    tape.absorb(events, {})
    return out


@quax.register(P.cond_p, **_OURS)
def _cond(index: ArrayLike, *args: ArrayLike | quax.ArrayValue, branches, **params: Any):
    if not _has_leaves(args):
        return P.cond_p.bind(index, *args, branches=branches, **params)
    shapes = {}
    for branch in branches:
        shapes |= jax.eval_shape(lambda values, b=branch: _run_taped(b, values)[1], list(args))
    events = []

    def taped(branch):
        def run(values):
            out, stats, seen = _run_taped(branch, values)
            events.extend(e for e in seen if e not in events)
            idle = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), {k: v for k, v in shapes.items() if k not in stats}
            )
            return out, {**stats, **idle}

        return run

    out, stats = jax.lax.switch(index, [taped(b) for b in branches], list(args))
    tape.absorb(events, stats)
    return out
