"""Parameters, MACs and activations of any Flax model, from its jaxpr: as they are, and as the NTIRE challenge counts them.

The challenge's counter (NTIRE 2022 efficient super-resolution, arXiv 2205.05675) is an odd instrument that whole tables are
made with. It is reproduced, and `Complexity.flags` says what it makes of the model at hand:
  one multiply-accumulate (MAC) is one "FLOP", biases are free;
  ReLU, LeakyReLU, ReLU6 and ELU cost one per element, sigmoid, tanh, GELU and SiLU nothing;
  a linear layer on [N, H, W, C] counts as N * H * H (first two axes of the input times the second of the output);
  products of two activations, as in attention, count nothing;
  "activations" are the outputs of convolutions only.
Flax's BatchNorm and PReLU, which the counter does count, leave no name in a jaxpr and are missed. Count the plain form of a
model: a convolution written as a matrix product is a linear layer here, and a kernel for compressed leaves counts as it runs.
"""

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxcomp.core.leaf import leaves_with_paths

_RECTIFIERS = {"relu", "leaky_relu", "relu6", "elu"}
_INTERPOLATION = {"_resize"}  # `jax.image.resize` is two matrix products; the counter takes it as free
_OPAQUE = {
    "while": "a loop of unknown length; use lax.scan or fori_loop with fixed bounds",
    "pallas_call": "a Pallas kernel; count the model on dense params",
}


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Cost of one forward pass.

    Attributes:
      params: elements of all params, compressed leaves by their logical shape.
      convs: convolutions called.
      conv_macs: their multiply-accumulates.
      conv_outputs: elements of their outputs.
      rectified: elements that pass ReLU, LeakyReLU, ReLU6 or ELU.
      smooth: elements that pass sigmoid, tanh or erf.
      linear_macs: multiply-accumulates of products with a matrix (rank 2, no batch axis).
      linear_outputs: elements of their outputs.
      linear_counted: what the challenge's counter makes of `linear_macs`.
      matmul_macs: multiply-accumulates of all other products.
    """

    params: int
    convs: int = 0
    conv_macs: int = 0
    conv_outputs: int = 0
    rectified: int = 0
    smooth: int = 0
    linear_macs: int = 0
    linear_outputs: int = 0
    linear_counted: int = 0
    matmul_macs: int = 0

    @property
    def flops(self) -> int:
        """FLOPs as the challenge counts them."""
        return self.conv_macs + self.rectified + self.linear_counted

    @property
    def activations(self) -> int:
        """Activations as the challenge counts them."""
        return self.conv_outputs

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.conv_macs + self.linear_macs + self.matmul_macs

    @property
    def flags(self) -> tuple[str, ...]:
        """What the challenge's counter hides or distorts for this model."""
        linear = (
            f"linear layers: {self.linear_macs:,} MACs are counted as {self.linear_counted:,}, "
            f"their {self.linear_outputs:,} outputs as no activations"
        )
        return tuple(
            text
            for distorted, text in (
                (self.linear_macs != self.linear_counted or self.linear_outputs, linear),
                (self.matmul_macs, f"products of activations: {self.matmul_macs:,} MACs are counted as 0"),
                (self.smooth, f"sigmoid, tanh, GELU: {self.smooth:,} elements are counted as 0, ReLU would not be"),
            )
            if distorted
        )


def complexity(apply: Callable, params: Any, *args: Any) -> Complexity:
    """Counts `apply(params, *args)`; nothing is computed, arrays may be abstract.

    Raises:
      ValueError: the model holds a `while` loop or a Pallas kernel, whose work cannot be read from a jaxpr.
    """
    size = sum(math.prod(leaf.shape) for leaf in leaves_with_paths(params).values())
    return Complexity(params=size, **_tally(jax.make_jaxpr(apply)(params, *args)))


def _tally(jaxpr: Any) -> Counter:
    return sum(map(_equation, jaxpr.eqns), Counter())


def _equation(eqn: Any) -> Counter:
    primitive, label = eqn.primitive.name, eqn.params.get("name")
    if label in _RECTIFIERS:
        return Counter(rectified=_size(eqn.outvars[0]))
    if label in _INTERPOLATION:
        return Counter()
    if primitive in _OPAQUE:
        raise ValueError(f"cannot count the work of {primitive}: {_OPAQUE[primitive]}")
    if primitive in _RULES:
        return _RULES[primitive](eqn)
    bodies = map(_tally, _bodies(eqn.params))
    if primitive == "cond":
        return functools.reduce(operator.or_, bodies)  # the largest of the branches
    length = eqn.params["length"] if primitive == "scan" else 1
    return Counter({key: value * length for key, value in sum(bodies, Counter()).items()})


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        items = value if isinstance(value, tuple | list) else (value,)
        yield from (item for item in items if hasattr(item, "eqns"))  # closed or open


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _conv(eqn: Any) -> Counter:
    """MACs as if no tap fell on padding, as the counter has it."""
    spec = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel) // kernel[spec.rhs_spec[0]]  # per output element: kernel window times inputs of its group
    out = _size(eqn.outvars[0])
    return Counter(convs=1, conv_macs=out * taps, conv_outputs=out)


def _dot(eqn: Any) -> Counter:
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    x, w = (variable.aval.shape for variable in eqn.invars)
    out = eqn.outvars[0].aval.shape
    macs = math.prod(out) * math.prod(x[axis] for axis in left)
    if batch or len(w) != 2 or len(x) < 2 or tuple(left) != (len(x) - 1,) or len(right) != 1:
        return Counter(matmul_macs=macs)
    return Counter(linear_macs=macs, linear_outputs=math.prod(out), linear_counted=x[0] * x[1] * out[1])


def _smooth(eqn: Any) -> Counter:
    return Counter(smooth=_size(eqn.outvars[0]))


_RULES = {"conv_general_dilated": _conv, "dot_general": _dot} | dict.fromkeys(
    ("logistic", "tanh", "erf", "erfc"), _smooth
)
