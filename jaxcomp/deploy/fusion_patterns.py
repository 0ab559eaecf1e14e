"""Finds, in a flat jaxpr, what a convolution may take over: the patterns of `jaxcomp.deploy.fuse`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from pallas_kernels.convolution import Epilogue, Window

MARK = "native_convolution"  # name of the jitted call in which `jaxcomp.formats.conv_form` runs the C++ kernel
RESIZE = "_resize"  # name of the jitted call that is `jax.image.resize`
_IDENTITY = Epilogue()
Range = tuple[Var, int, int]  # channels [start, stop) of a map


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution and the equations that it takes over, in order; `result` is the variable that the last one defines."""

    views: tuple[Range, ...]
    kernel: Var
    window: Window
    result: Var
    equations: tuple[int, ...]
    bias: Var | None = None
    other: Var | None = None
    epilogue: Epilogue = _IDENTITY

    def extended(self, graph: Graph, equations: Sequence[int], **changes) -> Chain:
        """The chain with further equations."""
        (result,) = graph.equations[equations[-1]].outvars
        return dataclasses.replace(self, equations=(*self.equations, *equations), result=result, **changes)


class Graph:
    """Who defines and who reads every variable."""

    def __init__(self, jaxpr: Jaxpr):
        self.equations: list[JaxprEqn] = list(jaxpr.eqns)
        self.producers = {var: eqn for eqn in self.equations for var in eqn.outvars}
        self.readers: dict[Var, list[int]] = collections.defaultdict(list)
        for index, eqn in enumerate(self.equations):
            for var in eqn.invars:
                if not isinstance(var, Literal):
                    self.readers[var].append(index)
        for var in jaxpr.outvars:
            if not isinstance(var, Literal):
                self.readers[var].append(len(self.equations))  # the caller

    def only_reader(self, var: Var, *names: str) -> int | None:
        """The equation that alone reads a variable, if it is of one of these primitives and has one result."""
        index, *more = self.readers[var] or [len(self.equations)]
        return index if not more and self.is_a(index, *names) else None

    def is_a(self, index: int, *names: str) -> bool:
        """Whether there is an equation of this index and of one of these primitives."""
        return index < len(self.equations) and self.equations[index].primitive.name in names

    def others(self, index: int, var: Var) -> list:
        """Operands of an equation besides one."""
        return [operand for operand in self.equations[index].invars if operand is not var]


def chains(jaxpr: Jaxpr) -> list[Chain]:
    """Every marked convolution with what it takes over; an equation belongs to one chain at most."""
    graph, taken, found = Graph(jaxpr), set(), []
    for index, eqn in enumerate(graph.equations):
        if eqn.params.get("name") != MARK:
            continue
        x, kernel = eqn.invars
        chain = Chain(ranges(graph, x), kernel, _window(eqn), eqn.outvars[0], (index,))
        for step in (_bias, _sum_and_activation, _activation, _join):
            longer = step(graph, chain)
            if longer is not None and taken.isdisjoint(longer.equations):
                chain = longer
        taken.update(chain.equations)
        found.append(chain)
    return found


def is_bilinear(eqn: JaxprEqn) -> bool:
    """Whether a call resizes height and width of a map as `jax.image.resize(x, shape, "bilinear", antialias=False)`."""
    if eqn.params.get("name") != RESIZE or len(eqn.invars) != 1 or len(eqn.invars[0].aval.shape) != 4:
        return False
    x, shape = eqn.invars[0].aval, eqn.outvars[0].aval.shape
    resize = lambda x: jax.image.resize(x, shape, "bilinear", antialias=False)
    same = [0, 3] == [axis for axis in (0, 3) if x.shape[axis] == shape[axis]]
    (expected,) = jax.make_jaxpr(resize)(jax.ShapeDtypeStruct(x.shape, x.dtype)).eqns
    return same and str(expected.params.get("jaxpr")) == str(eqn.params["jaxpr"])


def _window(eqn: JaxprEqn) -> Window:
    """Stride and padding of a marked call, whose default is XLA's convolution."""
    params = next(found.params for found in _equations(eqn) if found.primitive.name == "conv_general_dilated")
    return Window(params["window_strides"][0], tuple(params["padding"]))


def _equations(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """An equation and those of the programs that it holds."""
    yield eqn
    for value in eqn.params.values():
        for held in value if isinstance(value, tuple) else (value,):
            if isinstance(held, ClosedJaxpr):
                for inner in held.jaxpr.eqns:
                    yield from _equations(inner)


def ranges(graph: Graph, var: Var) -> tuple[Range, ...]:
    """Which channels of which maps a map [N, H, W, C] consists of; itself if one but the last has an odd number of them."""
    whole = (var, 0, var.aval.shape[-1])
    found = tuple(_ranges(graph, *whole))
    return (whole,) if any((stop - start) % 2 for _, start, stop in found[:-1]) else found


def _ranges(graph: Graph, var: Var, start: int, stop: int) -> list[Range]:
    eqn = graph.producers.get(var)
    pieces = [] if eqn is None else _pieces(eqn, var)
    if not pieces:
        return [(var, start, stop)]
    found, before = [], 0
    for source, offset, width in pieces:
        first, last = max(start, before), min(stop, before + width)
        if first < last:
            found += _ranges(graph, source, offset + first - before, offset + last - before)
        before += width
    return found


def _pieces(eqn: JaxprEqn, var: Var) -> list[tuple[Var, int, int]]:
    """(source, first channel, channels) of what an equation puts side by side; empty if it does anything else."""
    params, axis = eqn.params, len(var.aval.shape) - 1
    source = eqn.invars[0]
    match eqn.primitive.name:
        case "concatenate" if params["dimension"] == axis:
            return [(operand, 0, operand.aval.shape[-1]) for operand in eqn.invars]
        case "split" if params["axis"] == axis:
            place = eqn.outvars.index(var)
            return [(source, int(sum(params["sizes"][:place])), int(params["sizes"][place]))]
        case "slice" if params["strides"] is None and var.aval.shape[:-1] == source.aval.shape[:-1]:
            return [(source, params["start_indices"][-1], var.aval.shape[-1])]
    return []


def _bias(graph: Graph, chain: Chain) -> Chain | None:
    """The sum with a vector over channels."""
    index = graph.only_reader(chain.result, "add")
    if index is None:
        return None
    bias = _over_channels(graph, graph.others(index, chain.result)[0], chain.kernel.aval.shape[-1])
    if bias is None or bias.aval.dtype != chain.kernel.aval.dtype:
        return None
    return chain.extended(graph, [index], bias=bias)


def _over_channels(graph: Graph, var: Var | Literal, channels: int) -> Var | None:
    """The vector that is broadcast over all axes but the last, if that is what a variable is."""
    while not isinstance(var, Literal) and var.aval.shape != (channels,):
        eqn = graph.producers.get(var)
        shape = var.aval.shape
        if eqn is None or not shape or shape[-1] != channels:
            return None
        kept = eqn.primitive.name == "broadcast_in_dim" and eqn.params["broadcast_dimensions"][-1:] == (len(shape) - 1,)
        if not kept and not (eqn.primitive.name == "reshape" and np.prod(shape) == channels):
            return None
        var = eqn.invars[0]
    return None if isinstance(var, Literal) else var


def _sum_and_activation(graph: Graph, chain: Chain) -> Chain | None:
    """The sum with another map, if an activation follows."""
    joined = _join(graph, chain)
    if joined is None or joined.epilogue.join != "add":
        return None
    longer = _activation(graph, joined)
    return longer and dataclasses.replace(longer, epilogue=dataclasses.replace(longer.epilogue, join="add_first"))


def _activation(graph: Graph, chain: Chain) -> Chain | None:
    """A sigmoid, a ReLU, or the three equations of a leaky ReLU: select(y >= 0, y, slope * y)."""
    if chain.epilogue.activation != "identity":
        return None
    if (index := graph.only_reader(chain.result, "logistic")) is not None:
        return chain.extended(graph, [index], epilogue=Epilogue("sigmoid"))
    if (index := graph.only_reader(chain.result, "max")) is not None:
        is_relu = _scalar(graph, graph.others(index, chain.result)[0]) == 0
        return chain.extended(graph, [index], epilogue=Epilogue("leaky_relu", 0.0)) if is_relu else None
    readers = graph.readers[chain.result]
    if len(readers) != 3 or not all(map(graph.is_a, sorted(readers), ("ge", "mul", "select_n"))):
        return None
    compare, scale, select = sorted(readers)
    mask, scaled = (graph.equations[index].outvars[0] for index in (compare, scale))
    factors = graph.others(scale, chain.result)
    slope = _scalar(graph, factors[0]) if factors else None
    zero = graph.equations[compare].invars
    is_leaky = (
        slope is not None
        and (zero[0] is chain.result and _scalar(graph, zero[1]) == 0)
        and [mask, scaled, chain.result] == graph.equations[select].invars
        and graph.only_reader(mask, "select_n") == graph.only_reader(scaled, "select_n") == select
    )
    return chain.extended(graph, [compare, scale, select], epilogue=Epilogue("leaky_relu", slope)) if is_leaky else None


def _scalar(graph: Graph, var: Var | Literal) -> float | None:
    """The number that an operand is everywhere, if that is known."""
    if isinstance(var, Literal):
        return float(var.val) if np.ndim(var.val) == 0 else None
    eqn = graph.producers.get(var)
    if eqn is None or eqn.primitive.name not in ("convert_element_type", "broadcast_in_dim"):
        return None
    value = _scalar(graph, eqn.invars[0])
    return None if value is None else float(np.asarray(value, var.aval.dtype))


def _join(graph: Graph, chain: Chain) -> Chain | None:
    """The sum or product with another map, or the sum with a smaller one that is resized for it alone."""
    index = graph.only_reader(chain.result, "add", "mul")
    if index is None or chain.other is not None:
        return None
    (other,) = graph.others(index, chain.result)
    kind = lambda var: (var.aval.shape, var.aval.dtype)
    if isinstance(other, Literal) or kind(other) != kind(chain.result):
        return None
    join, taken = {"add": "add", "mul": "multiply"}[graph.equations[index].primitive.name], [index]
    producer = graph.producers.get(other)
    if join == "add" and producer is not None and is_bilinear(producer) and graph.only_reader(other, "add") == index:
        join, taken, other = "add_resized", [graph.equations.index(producer), index], producer.invars[0]
    return chain.extended(graph, taken, other=other, epilogue=dataclasses.replace(chain.epilogue, join=join))
