"""What surrounds a C++ convolution, done inside its call: one pass over memory and one rounding instead of several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxcomp.deploy.fusion_patterns import MARK, Chain, chains, is_bilinear
from pallas_kernels.convolution import Epilogue, View, fused_convolution


class Fusion(NamedTuple):
    """One convolution and what it took over: the kernel's shape, ranges of channels that it reads, bias and epilogue."""

    kernel: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    has_bias: bool
    epilogue: Epilogue

    def __str__(self) -> str:
        steps = ["bias"] * self.has_bias + [self.epilogue.activation, self.epilogue.join]
        taken = ", ".join(step for step in steps if step not in ("identity", "none"))
        reads = " | ".join(f"{start}:{stop}" for start, stop in self.ranges)
        return f"{'x'.join(map(str, self.kernel))} of channels {reads}: {taken or 'nothing'}"


def fuse_convolutions(fn: Callable) -> Callable:
    """`fn` with every C++ convolution taking over what surrounds it: `jax.jit(fuse_convolutions(compressed(model.apply)))`.

    A convolution in the native form (`cpu_convolutions`) takes over the bias that follows it, then an activation (ReLU, leaky
    ReLU, sigmoid), then a sum or product with another map, or the sum before the activation, as far as nobody else reads what
    lies between; a map that `jax.image.resize` makes for such a sum (bilinear) is resized in the call; and it reads ranges of
    channels (split, slice, concatenate) where they are. The sums stay float32 until the end, so bfloat16 is rounded less
    often; float32 is the same to the order of sums. Bodies of `scan`, `while` and `cond` stay as they are, and so does a
    function without such a convolution. Gradients run XLA's convolution; that of a ReLU at 0 may be another subgradient.
    Machines other than CPUs run the library's convolution and what follows it.

    Positional arguments are trees of arrays; keyword arguments are passed as they are.
    """

    @functools.wraps(fn)
    def run(*args, **kwargs):
        closed, shapes = jax.make_jaxpr(functools.partial(fn, **kwargs), return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        flat = _inlined(closed)
        found = chains(flat.jaxpr)
        out = _run(flat, leaves, found) if found else jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return run


def fusions(fn: Callable, *args: Any, **kwargs: Any) -> tuple[Fusion, ...]:
    """What `fuse_convolutions(fn)` fuses for these arguments (arrays or `jax.ShapeDtypeStruct`s), in the order of the program."""
    closed = jax.make_jaxpr(functools.partial(fn, **kwargs))(*args)
    describe = lambda chain: Fusion(
        chain.kernel.aval.shape,
        tuple((start, stop) for _, start, stop in chain.views),
        chain.bias is not None,
        chain.epilogue,
    )
    return tuple(map(describe, chains(_inlined(closed).jaxpr)))


def _inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program without calls other than the marked ones."""

    def rule(index: int, eqn: JaxprEqn, read: Callable):
        del index
        body = _body(eqn)
        return None if body is None else _interpret(body, [read(var) for var in eqn.invars], rule)

    return jax.make_jaxpr(lambda *args: _interpret(closed, args, rule))(*closed.in_avals)


def _body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The body of a call that is inlined: `jit`, but for what chains look for, and ReLU, which has a derivative of its own."""
    kind = eqn.primitive.name
    if kind == "jit":
        return None if eqn.params["name"] == MARK or is_bilinear(eqn) else eqn.params["jaxpr"]
    return eqn.params["call_jaxpr"] if kind == "custom_jvp_call" and _is_relu(eqn.params["call_jaxpr"]) else None


def _is_relu(body: ClosedJaxpr) -> bool:
    """Whether a body is nothing but a maximum."""
    (first, *more) = body.eqns or [None]
    if first is None or more:
        return False
    return first.primitive.name == "max" or (first.primitive.name == "jit" and _is_relu(first.params["jaxpr"]))


def _run(closed: ClosedJaxpr, args: Sequence[Any], found: Iterable[Chain]) -> list:
    """Evaluates a flat program, each chain as one call at the place of its last equation."""
    ends = {chain.equations[-1]: chain for chain in found}
    inner = {index for chain in ends.values() for index in chain.equations[:-1]}

    def rule(index: int, eqn: JaxprEqn, read: Callable):
        if index in inner:
            return [None] * len(eqn.outvars)
        if (chain := ends.get(index)) is None:
            return None
        views = [View(read(var), start, stop) for var, start, stop in chain.views]
        bias, other = (None if var is None else read(var) for var in (chain.bias, chain.other))
        return [fused_convolution(views, read(chain.kernel), bias, other, chain.epilogue, chain.window)]

    return _interpret(closed, args, rule)


def _interpret(closed: ClosedJaxpr, args: Sequence[Any], rule: Callable) -> list:
    """Evaluates a program; `rule(index, equation, read)` answers with the results of an equation, or None to let it run."""
    env = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda var: var.val if isinstance(var, Literal) else env[var]
    for index, eqn in enumerate(closed.jaxpr.eqns):
        out = rule(index, eqn, read)
        if out is None:
            out = eqn.primitive.bind(*map(read, eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(var) for var in closed.jaxpr.outvars]
