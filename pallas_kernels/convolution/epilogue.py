"""What a convolution does besides its sums: steps, reads ranges of channels, adds a bias, activates, joins another map."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["identity", "leaky_relu", "sigmoid"]
Join = Literal["none", "add", "multiply", "add_first", "add_resized"]
ACTIVATIONS: tuple[Activation, ...] = ("identity", "leaky_relu", "sigmoid")
JOINS: tuple[Join, ...] = ("none", "add", "multiply", "add_first", "add_resized")
Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["map"], meta_fields=["start", "stop"])
@dataclasses.dataclass(frozen=True)
class View:
    """Channels [start, stop) of a map [N, H, W, C]."""

    map: jax.Array
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Where a kernel [h, w, I, O] is laid: every `stride` pixels of a map with zeros around it.

    Attributes:
      stride: of rows and of columns.
      padding: zeros (above, below), (left, right), each fewer than the kernel has; None is half a kernel of odd size.
    """

    stride: int = 1
    padding: Padding | None = None

    def around(self, kernel: tuple[int, ...]) -> Padding:
        """The padding for a kernel of this shape."""
        return self.padding or tuple((size // 2, size // 2) for size in kernel[:2])

    def inside(self, kernel: tuple[int, ...]) -> bool:
        """Whether every side has fewer zeros than the kernel."""
        sides = zip(self.around(kernel), kernel, strict=False)
        return all(0 <= zeros < size for pair, size in sides for zeros in pair)

    def of(self, map: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The shape of the result for shapes of a map [N, H, W, C] and a kernel."""
        sizes = zip(map[1:3], kernel[:2], self.around(kernel), strict=True)
        height, width = ((size + sum(zeros) - window) // self.stride + 1 for size, window, zeros in sizes)
        return map[0], height, width, kernel[3]


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """`join(activation(sums + bias), other)`; `slope` is that of a leaky ReLU below zero, 0 for a ReLU.

    The join "add_first" is `activation(sums + bias + other)`; "add_resized" adds the other map, of any size, resized to that
    of the result: bilinear, half-pixel centres, as `jax.image.resize` without antialiasing.
    """

    activation: Activation = "identity"
    slope: float = 0.0
    join: Join = "none"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS or self.join not in JOINS:
            raise ValueError(f"{self}: expected an activation of {ACTIVATIONS} and a join of {JOINS}")

    def __call__(self, sums: jax.Array, bias: jax.Array, other: jax.Array | None) -> jax.Array:
        """The definition, in the dtype of the sums [N, H, W, O]."""
        y = sums + bias.astype(sums.dtype)[None, None, None]
        y = y + other.astype(y.dtype) if self.join == "add_first" else y
        if self.activation == "leaky_relu":
            y = jnp.where(y < 0, y * self.slope if self.slope else jnp.zeros((), y.dtype), y)
        elif self.activation == "sigmoid":
            y = jax.nn.sigmoid(y)
        if self.join in ("none", "add_first"):
            return y
        if self.join == "add_resized":
            return y + jax.image.resize(other.astype(y.dtype), y.shape, "bilinear", antialias=False)
        return y + other.astype(y.dtype) if self.join == "add" else y * other.astype(y.dtype)
