"""What all weight quantizers share: the scheme (grid of weights and activations) and the choice of leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, materialise
from jaxcomp.core.rules import Rule, resolve
from jaxcomp.formats import ActivationQuantizer, FakeQuantizedArray, Grid, Layout, MaskedArray, QuantizedArray
from jaxcomp.formats.grid import qparams

GRAM_BYTES = 1 << 30  # Gram matrices that a method asks of one pass over the data
KERNELS = (Rule("re:.*/?kernel(/value)?"),)  # Flax's name for the weights of Dense, DenseGeneral, Conv and attention


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a leaf is quantized. Every field may be set per leaf by a `Rule`.

    Attributes:
      bits: weight bits 1..8; 16 leaves the leaf alone.
      group_size: inputs that share a scale; 0 one scale per output channel, -1 one per tensor.
      symmetric: symmetric weight grid.
      levels: number of levels if not 2**bits.
      act_bits: activation bits (dynamic, per token); None or 16 keeps activations in floating point.
      act_symmetric: symmetric activation grid.
      scale_dtype: dtype of stored scales.
      axes: contracted axes, where neither data nor the shape tells.
    """

    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    levels: int = 0
    act_bits: int | None = None
    act_symmetric: bool = True
    scale_dtype: str = "float32"
    axes: tuple[int, ...] | None = None

    @property
    def grid(self) -> Grid:
        """Weight grid."""
        return Grid(self.bits, self.levels, self.symmetric, self.group_size)

    @property
    def act(self) -> ActivationQuantizer | None:
        """Activation quantizer."""
        if self.act_bits is None or self.act_bits >= 16:
            return None
        return ActivationQuantizer(Grid(self.act_bits, symmetric=self.act_symmetric))


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf that a quantizer is to replace.

    Attributes:
      path: its path.
      matrix: float32 [*batch, N, K].
      layout: view that turns the matrix back into the leaf.
      scheme: how to quantize it.
      dtype: logical dtype.
    """

    path: str
    matrix: jax.Array
    layout: Layout
    scheme: Scheme
    dtype: Any

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrices [*batch, K, K] of its inputs, float32."""
        *batch, _, k = self.matrix.shape
        return math.prod(batch) * k * k * 4

    def rounded(self, matrix: jax.Array | None = None) -> QuantizedArray:
        """Round-to-nearest of the matrix, or of a given one, on its own min-max grid."""
        matrix = self.matrix if matrix is None else matrix
        return self.encode(matrix, *_qparams(matrix, self.scheme.grid))

    def encode(self, matrix: jax.Array, scale: jax.Array, zero: jax.Array) -> QuantizedArray:
        """Codes of a matrix on a given grid."""
        s = self.scheme
        dtype = jnp.dtype(self.dtype).name
        return _encode(matrix, scale, zero, s.grid, self.layout, dtype, s.act, s.scale_dtype)


_qparams = jax.jit(qparams)
_encode = jax.jit(QuantizedArray.encode, static_argnums=(5, 7))


def targets(params: Any, rules: Sequence[Rule], defaults: Mapping[str, Any], stats: Any = None) -> list[Target]:
    """The leaves that `rules` select, as float32 matrices with their schemes, in the order of use (tree order without `stats`).

    Dense arrays, masked and fake-quantized leaves can be quantized; leaves that are quantized or frozen already are passed over.

    Args:
      params: the tree.
      rules: which leaves, with options that override `defaults` (fields of `Scheme`).
      defaults: options of the method.
      stats: a `Calibration` or None; it knows which axes a model contracts.

    Raises:
      ValueError: a rule matches nothing; an option is unknown; a leaf has NaN or Inf; its axes cannot be told; a group size does
        not divide K. Every message names the path.
    """
    leaves = leaves_with_paths(params)
    chosen = resolve(rules, leaves)
    usage = stats.usage(params) if stats is not None else {}
    rank = {path: i for i, path in enumerate(usage)}
    out = []
    for path in sorted(chosen, key=lambda p: rank.get(p, len(rank))):
        leaf, options = leaves[path], chosen[path]
        if is_compressed(leaf) and not isinstance(leaf, MaskedArray | FakeQuantizedArray):
            continue
        scheme = _scheme(path, {**defaults, **options})
        if len(leaf.shape) >= 2 and scheme.bits < 16:
            out.append(_target(path, leaf, scheme, usage.get(path)))
    return out


def need_data(stats: Any, method: str) -> None:
    """Raises ValueError if a method that needs calibration data got none."""
    if stats is None:
        raise ValueError(
            f"{method} needs calibration data; call compress({method}(...), params, Calibration(apply, batches))"
        )


def over_batch(fn: Callable, ndim: int) -> Callable:
    """`fn` of matrices, over `ndim` leading batch axes."""
    for _ in range(ndim):
        fn = jax.vmap(fn)
    return fn


def in_passes(items: Sequence[Any], target: Callable[[Any], Target]) -> Iterator[list[Any]]:
    """Runs of items whose targets' Gram matrices fit `GRAM_BYTES` (at least one item each): each is one pass over the data."""
    run: list[Any] = []
    for item in items:
        if run and sum(target(i).gram_bytes for i in [*run, item]) > GRAM_BYTES:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _scheme(path: str, options: Mapping[str, Any]) -> Scheme:
    known = {f.name for f in dataclasses.fields(Scheme)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{path}: unknown options {unknown}; known are {sorted(known)}")
    return Scheme(**options)


def _target(path: str, leaf: Any, scheme: Scheme, usage: Any) -> Target:
    axes = scheme.axes or (usage.axes if usage else _axes_by_shape(path, leaf.shape))
    axes = tuple(a if a < 0 else a - len(leaf.shape) for a in axes)
    batch = usage.batch_ndim if usage else 0
    dense = materialise(leaf)
    if not isinstance(dense, jax.core.Tracer) and not bool(jnp.isfinite(dense).all()):
        raise ValueError(
            f"{path}: {int((~jnp.isfinite(dense)).sum())} weights are NaN or Inf; repair the checkpoint first"
        )
    layout = Layout.of(dense.shape[batch:], axes)
    try:
        scheme.grid.groups(layout.matrix_shape[1])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Target(path, layout.to_matrix(dense.astype(jnp.float32)), layout, scheme, leaf.dtype)


def _axes_by_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flax's conventions where they leave no doubt: Dense [in, out], Conv [H, W, in, out], Embed [vocab, dim]."""
    if path.removesuffix("/value").endswith("embedding") and len(shape) == 2:
        return (-1,)
    if len(shape) == 2:
        return (-2,)
    if len(shape) == 4:
        return (-4, -3, -2)
    raise ValueError(
        f"{path}: shape {shape} does not tell which axes are contracted; pass calibration data, or Rule({path!r}, axes=(...))"
    )
