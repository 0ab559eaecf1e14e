"""The one place that knows versions: what differs between the releases of jax and quax that we support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, set_current_trace
from quax import _trace as _quax_trace


def split_scan_operands(args: Sequence[Any], params: dict[str, Any]) -> tuple[list, list, list]:
    """Splits the flat operands of `lax.scan_p` into (consts, carry, xs); jax 0.11 renamed the parameters."""
    if "num_consts" in params:
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        return list(args[:first]), list(args[first:last]), list(args[last:])
    return tuple(list(group.vals) for group in params["ft_in"].update(args).unpack())


def close_jaxpr(jaxpr: Any) -> Any:
    """The closed form of `remat`'s jaxpr; jax 0.12 merged the open and the closed class."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _dense(trace, tracers) -> tuple | None:
    """The arrays behind the tracers, or None if one of them is a custom array type."""
    values = [trace.to_value(t) for t in tracers]
    return tuple(v.array for v in values) if all(isinstance(v, _quax_trace._DenseArrayValue) for v in values) else None


def _through_primal(trace, fun, tracers):
    """Evaluates the primal under the trace: a custom rule for dense operands says nothing about a compressed one."""
    with set_current_trace(trace):
        return fun.call_wrapped(*tracers)


def _process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, /, *, out_trees, symbolic_zeros):
    """`custom_vjp` under quax: kept as it is for dense operands, differentiated through its primal otherwise."""
    if (arrays := _dense(self, tracers)) is None:
        return _through_primal(self, fun, tracers)
    params = {"subfuns": (fun, fwd, bwd), "out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
    out = primitive.bind_with_trace(self.parent_trace, arrays, tuple(map(jax.typeof, arrays)), params)
    return [_quax_trace._QuaxTracer(self, _quax_trace._wrap_if_array(x)) for x in out]


def _complete_custom_jvp(process):
    def process_custom_jvp_call(self, primitive, fun, jvp, tracers, /, *, symbolic_zeros):
        """`custom_jvp` under quax: its own handling for dense operands, differentiated through its primal otherwise."""
        if _dense(self, tracers) is None:
            return _through_primal(self, fun, tracers)
        return process(self, primitive, fun, jvp, tracers, symbolic_zeros=symbolic_zeros)

    process_custom_jvp_call.completed = True
    return process_custom_jvp_call


def complete_quax() -> None:
    """Completes what quax 0.4 leaves open: `custom_vjp` has no handler, and `custom_jvp` hands a leaf's components to the
    custom rule as if they were its tangent. A quax that has its own `custom_vjp` keeps it.
    """
    trace = _quax_trace._QuaxTrace
    if "process_custom_vjp_call" not in vars(trace):
        trace.process_custom_vjp_call = _process_custom_vjp_call
    if not hasattr(trace.process_custom_jvp_call, "completed"):
        trace.process_custom_jvp_call = _complete_custom_jvp(trace.process_custom_jvp_call)
