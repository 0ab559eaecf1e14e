"""`ObservedArray`: a weight that computes as usual and reports statistics of what it is multiplied with."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax

from jaxcomp.core import tape
from jaxcomp.core.leaf import CompressedArray, is_compressed, materialise
from jaxcomp.formats.contraction import contract_last, register_dot_general
from jaxcomp.formats.convolution import register_conv

STATISTICS = ("count", "sum", "max_abs", "max_value", "min_value", "sum_abs", "sum_sq", "gram")


class ObservedArray(CompressedArray):
    """Wraps an array or compressed leaf; each contraction adds statistics of the partner X [T, K] to the open tape.

    K runs over the contracted axes of the *stored* value in ascending order, whatever transposition the model applied.
    Statistics, all float32: `count` T; `sum`, `sum_abs`, `sum_sq`, `max_abs`, `max_value`, `min_value` [K]; `gram` X^T X [K, K].

    Attributes:
      value: the array or leaf.
      perm: axes of the value in the order in which the model currently sees them; empty for the order of the value.
      needs: which statistics to collect.
    """

    kind = "observed"
    value: Any
    perm: tuple[int, ...] = eqx.field(static=True, default=())
    needs: tuple[str, ...] = eqx.field(static=True, default=())
    name: str = eqx.field(static=True, default="")

    def __check_init__(self):
        if unknown := sorted(set(self.needs) - set(STATISTICS)):
            raise ValueError(f"unknown statistics {unknown}; known are {STATISTICS}")

    @classmethod
    def of(cls, value: Any, needs: tuple[str, ...] = (), name: str = "") -> ObservedArray:
        """Observes an array or leaf."""
        return cls(value, (), tuple(sorted(needs)), name)

    @property
    def axes(self) -> tuple[int, ...]:
        """Axis of the value behind each logical axis."""
        return self.perm or tuple(range(len(self.value.shape)))

    def aval(self) -> jax.core.ShapedArray:
        """Shape of the current view, dtype of the value."""
        return jax.core.ShapedArray(tuple(self.value.shape[a] for a in self.axes), self.value.dtype)

    def view(self) -> Any:
        """The value as the model sees it: itself where nothing was transposed, else transposed."""
        return quax.quaxify(jnp.transpose)(self.value, self.perm) if self.perm else self.value

    def materialise(self) -> Any:
        """The current view."""
        return self.view()

    def transpose(self, permutation):
        """View under `jnp.transpose`."""
        return ObservedArray(self.value, tuple(self.axes[p] for p in permutation), self.needs, self.name)

    def astype(self, dtype):
        """The value under another dtype."""
        value = quax.quaxify(lax.convert_element_type)(self.value, dtype)
        return ObservedArray(value, self.perm, self.needs, self.name)

    def copy(self):
        """Leaves are immutable: the leaf itself."""
        return self

    def take(self, ids: jax.Array):
        """Rows of an observed table: nothing to observe, but the use is recorded."""
        tape.event(self.name, "gather", "observed", self.shape, axes=_negative(self.axes[1:], len(self.axes)))
        return quax.quaxify(lambda table: jnp.take(table, ids, axis=0))(self.view())


def statistics(x: jax.Array, needs: tuple[str, ...]) -> dict[str, jax.Array]:
    """The named statistics of x [T, K], in float32."""
    x = x.astype(jnp.float32)
    compute = {
        "count": lambda: jnp.float32(x.shape[0]),
        "sum": lambda: x.sum(0),
        "max_abs": lambda: jnp.abs(x).max(0),
        "max_value": lambda: x.max(0),
        "min_value": lambda: x.min(0),
        "sum_abs": lambda: jnp.abs(x).sum(0),
        "sum_sq": lambda: (x * x).sum(0),
        "gram": lambda: jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST),
    }
    return {name: compute[name]() for name in needs}


def _negative(axes, ndim: int) -> tuple[int, ...]:
    return tuple(sorted(a - ndim for a in axes))


def _dot(x, leaf: ObservedArray, dims):
    axes = [leaf.axes[a] for a in dims.leaf]
    tape.event(leaf.name, "dot_general", "observed", leaf.shape, axes=_negative(axes, len(leaf.axes)))
    if leaf.needs and not dims.leaf_batch:
        order = sorted(range(len(axes)), key=axes.__getitem__)
        flat = contract_last(x, [dims.x[i] for i in order])
        tape.add_stats(leaf.name, statistics(flat.reshape(-1, flat.shape[-1]), leaf.needs))
    numbers = ((dims.x, dims.leaf), (dims.x_batch, dims.leaf_batch))
    product = lambda a, w: lax.dot_general(a, w, numbers)
    return quax.quaxify(product)(x, leaf.view()) if is_compressed(leaf.view()) else product(x, leaf.view())


def _conv(x, leaf: ObservedArray, spec, conv, params):
    in_axes = spec.rhs_spec[1:]
    axes = [leaf.axes[a] for a in in_axes]
    tape.event(leaf.name, "conv_general_dilated", "observed", leaf.shape, axes=_negative(axes, len(leaf.axes)))
    if leaf.needs and params["feature_group_count"] == params["batch_group_count"] == 1:
        patches = _patches(x, [leaf.shape[a] for a in in_axes], spec, params)
        patches = patches.transpose(0, *(1 + i for i in sorted(range(len(axes)), key=axes.__getitem__)))
        tape.add_stats(leaf.name, statistics(patches.reshape(patches.shape[0], -1), leaf.needs))
    return conv(x, materialise(leaf.view(), "conv_general_dilated"))


def _patches(x, sizes: list[int], spec, params) -> jax.Array:
    """What the kernel is multiplied with at every output position: [T, in, *spatial]."""
    keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    patches = lax.conv_general_dilated_patches(x, sizes[1:], **{k: params[k] for k in keys}, dimension_numbers=spec)
    features = jnp.moveaxis(patches, spec.out_spec[1], -1)
    return features.reshape(-1, *sizes)


register_dot_general(ObservedArray, _dot)
register_conv(ObservedArray, _conv)
