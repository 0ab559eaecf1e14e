"""What a convolution does besides its sums: reads ranges of channels, adds a bias, activates, joins another map."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["identity", "leaky_relu", "sigmoid"]
Join = Literal["none", "add", "multiply", "add_first"]
ACTIVATIONS: tuple[Activation, ...] = ("identity", "leaky_relu", "sigmoid")
JOINS: tuple[Join, ...] = ("none", "add", "multiply", "add_first")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["map"], meta_fields=["start", "stop"])
@dataclasses.dataclass(frozen=True)
class View:
    """Channels [start, stop) of a map [N, H, W, C]."""

    map: jax.Array
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """`join(activation(sums + bias), other)`; `slope` is that of a leaky ReLU below zero, 0 for a ReLU.

    The join "add_first" is `activation(sums + bias + other)`.
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
        return y + other.astype(y.dtype) if self.join == "add" else y * other.astype(y.dtype)
