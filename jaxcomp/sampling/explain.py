"""What a compiled sampler really holds: how many trunks it runs, and whether a skipped one costs anything."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from jaxcomp.sampling.loop import SCOPE

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\([^=]*?\)|\S+) (?P<op>[\w-]+)\(", re.M)
_SCOPE = re.compile(SCOPE + r"_(\d+)_(\d+)/")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class SamplerProgram:
    """A compiled sampler, from its optimised HLO.

    Attributes:
      bodies: copies of the trunk in the program.
      evaluations: trunks that a run executes: a copy inside a scan counts once per step of the scan; None with executor "cond",
        where that is decided while sampling.
      conditionals: `conditional` instructions.
      largest_select: elements of the largest `select` of the program.
      matmuls: `dot` and `convolution` instructions, fused ones included.
      flops: of one run as XLA counts them; XLA counts the body of a loop once.
    """

    bodies: int
    evaluations: int | None
    conditionals: int
    largest_select: int
    matmuls: int
    flops: float


def explain_sampler(fn: Callable, *args: Any, **kwargs: Any) -> SamplerProgram:
    """Compiles `fn(*args, **kwargs)`, which calls `sample` with executor "static" or "cond", and reads the result.

    Args:
      fn: a function of arrays, not jitted or jitted.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: further ones.
    """
    compiled = jax.jit(fn).lower(*args, **kwargs).compile()
    text = compiled.as_text()
    pieces = {(int(a), int(b)) for a, b in _SCOPE.findall(text)}
    dynamic = f"{SCOPE}_cond/" in text
    instructions = [(m["type"], m["op"]) for m in _INSTRUCTION.finditer(text)]
    count = lambda *ops: sum(op in ops for _, op in instructions)
    cost = compiled.cost_analysis() or {}
    return SamplerProgram(
        bodies=len(pieces) + dynamic,
        evaluations=None if dynamic else sum(stop - start for start, stop in pieces),
        conditionals=count("conditional"),
        largest_select=max((_elements(kind) for kind, op in instructions if op == "select"), default=0),
        matmuls=count("dot", "convolution"),
        flops=float(cost.get("flops", 0.0)),
    )


def _elements(kind: str) -> int:
    return max(math.prod(map(int, filter(None, dims.split(",")))) for dims in _SHAPE.findall(kind))
