"""`arbitrary_bit_matmul`: the public function, and the choice of an implementation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.arbitrary_bit_matmul import (
    cpu_ffi,
    gpu_mosaic,
    gpu_triton,
    layouts,
    packing,
    reference,
    tiles,
    tpu,
    xla,
)
from pallas_kernels.arbitrary_bit_matmul.activation import ActivationCodes, quantize_activations
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, WeightSpec
from pallas_kernels.dispatch import Choice, as_names, backend, first_that_covers

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        xla.BACKEND,
        cpu_ffi.BACKEND,
        tpu.BACKEND,
        gpu_mosaic.BACKEND,
        gpu_triton.BACKEND,
        reference.BACKEND,
    )
}
_PREFERRED = jax.make_user_context(None)


class _Static(NamedTuple):
    spec: WeightSpec
    act_bits: int | None
    act_symmetric: bool
    implementation: tuple[str, ...] | None


def arbitrary_bit_matmul(
    x: Float[Array, "*batch k"],
    packed: jax.Array | Prepared,
    scale: Float[Array, "n g"],
    zero: jax.Array | None = None,
    *,
    bits: int,
    levels: int = 0,
    act_bits: int | None = None,
    act_symmetric: bool = True,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch n"]:
    """x W^T for W[n,k] = (u[n,k] - zero[n,g]) scale[n,g] with u of 1 to 8 bits; the dtype of x, float32 accumulation.

    With `act_bits`, x is quantized per token and products are exact integers inside a group (ABQ-LLM, arXiv 2408.08554).
    Gradients are those of the decoded weight, straight through the quantization of x.

    Args:
      x: activations [..., K].
      packed: u as dense words uint32 [N, ceil(K bits / 32)] (see `packing`), or `prepare`d for an implementation.
      scale: [N, G], each over K / G consecutive columns.
      zero: zero points in codes, [N, G], integers or floats; None is levels // 2 (2^(bits-1) without levels).
      bits: 1..8.
      levels: codes in use, 0 for 2**bits; 5 with 3 bits is ABQ-LLM's W2*.
      act_bits: bits of x, 1..8; None keeps x in floating point.
      act_symmetric: whether activations have no zero point.
      implementation: a name of `BACKENDS`, names in order of preference, or None for the platform's own order.

    Raises:
      ValueError: shapes, bits or levels do not fit together, or an implementation is unknown.
      ExceptionGroup: every named implementation refused; one NotImplementedError each.
    """
    spec = weight_spec(packed, scale, zero, k=x.shape[-1], bits=bits, levels=levels)
    static = _Static(spec, act_bits, act_symmetric, as_names(implementation))
    y = _float_matmul(x.reshape(-1, spec.k), packed, scale, zero, static)
    return y.astype(x.dtype).reshape(*x.shape[:-1], spec.n)


def code_matmul(
    x: ActivationCodes,
    packed: jax.Array | Prepared,
    scale: Float[Array, "n g"],
    zero: jax.Array | None = None,
    *,
    bits: int,
    levels: int = 0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "m n"]:
    """The same for activations that are quantized already, with their own scales and zero points; float32, no gradient."""
    spec = weight_spec(packed, scale, zero, k=x.codes.shape[-1], bits=bits, levels=levels)
    return _code_product(x, packed, scale, zero, spec, as_names(implementation))


def prepare(packed: jax.Array, *, k: int, groups: int, bits: int, levels: int = 0, implementation: str) -> Prepared:
    """Dense words in the layout that an implementation likes best; done once per weight, else calls may have to do it."""
    spec = WeightSpec(packed.shape[-2], k, groups, bits, levels)
    first = backend(BACKENDS, implementation).layouts(spec)[:1]
    return layouts.convert(_prepared(packed), first, spec)


def choose(spec: WeightSpec, x: jax.Array, packed, names: Sequence[str], convert: bool = True) -> Choice:
    """The first of the named implementations that covers x [M, K] times the weight.

    Args:
      spec: of the weight.
      x: activations, or their shape and dtype.
      packed: the weight, or its shapes.
      names: in order of preference.
      convert: whether dense words may be brought to an implementation's layout in every call.

    Raises:
      ExceptionGroup: none does; one NotImplementedError each.
    """
    refuse = lambda name: _refusal(backend(BACKENDS, name), spec, x, packed, convert)
    return first_that_covers(names, refuse, "product")


def prefer(*names: str) -> contextlib.AbstractContextManager:
    """While it is entered, products without `implementation=` try these first; jitted functions are traced again.

    Raises:
      ValueError: an implementation is unknown.
    """
    for name in names:
        backend(BACKENDS, name)
    return _PREFERRED(names or None)


def preference() -> dict[str, tuple[str, ...]]:
    """Platform -> implementations in the order in which they are tried without `implementation=`; 'xla' ends every list."""
    known = _platform_orders()
    if not (first := _PREFERRED.value):
        return known
    return {platform: tuple(dict.fromkeys((*first, *names))) for platform, names in known.items()}


def _platform_orders() -> dict[str, tuple[str, ...]]:
    cpu = ("cpu_ffi", "xla") if cpu_ffi.is_built() else ("xla",)
    return {"cpu": cpu, "tpu": ("tpu", "xla"), "cuda": ("triton", "mosaic_gpu", "xla")}


def platform_preference() -> tuple[str, ...]:
    """`preference` of the default platform."""
    return preference().get(jax.default_backend().replace("gpu", "cuda"), ("xla",))


def weight_spec(packed, scale, zero, *, k: int, bits: int, levels: int = 0) -> WeightSpec:
    """The static facts of a weight. Raises ValueError where arrays do not fit them."""
    n, groups = scale.shape
    spec = WeightSpec(n, k, groups, bits, levels)
    if not isinstance(packed, Prepared):
        want = (n, packing.dense_words(k, bits))
        if packed.shape != want or packed.dtype != jnp.uint32:
            raise ValueError(
                f"packed: expected uint32 {want}, found {packed.dtype} {packed.shape}; see `packing.pack_dense`"
            )
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero: expected {scale.shape} like scale, found {zero.shape}")
    return spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _float_matmul(x, packed, scale, zero, static: _Static):
    if static.act_bits is None:
        return _centred_product(x, packed, scale, zero, static.spec, static.implementation)
    codes = quantize_activations(x, static.act_bits, static.act_symmetric)
    return _code_product(codes, packed, scale, zero, static.spec, static.implementation)


def _forward(x, packed, scale, zero, static):
    return _float_matmul(x, packed, scale, zero, static), (x, packed, scale, zero)


def _backward(static, residuals, dy):
    """Gradients of the dense product with the decoded weight, in XLA; integer arguments have none."""
    x, packed, scale, zero = residuals
    codes = layouts.unpack(_prepared(packed), static.spec)
    full = jnp.float32(static.spec.centre) if zero is None else zero.astype(jnp.float32)
    full = jnp.broadcast_to(full, scale.shape)
    seen = x if static.act_bits is None else quantize_activations(x, static.act_bits, static.act_symmetric).values()
    product = lambda x, scale, zero: reference.dense_product(x, codes, scale, zero)
    _, pull = jax.vjp(product, seen.astype(jnp.float32), scale.astype(jnp.float32), full)
    dx, dscale, dzero = pull(dy.astype(jnp.float32))
    floating = zero is not None and jnp.issubdtype(zero.dtype, jnp.floating)
    return dx.astype(x.dtype), None, dscale.astype(scale.dtype), dzero.astype(zero.dtype) if floating else None


_float_matmul.defvjp(_forward, _backward)


def _code_product(x: ActivationCodes, packed, scale, zero, spec, implementation):
    """sx (qx W^T - zx (1 W^T)): the row sums of W are one more row of activations, all ones."""
    if x.zero is None:
        return x.scale * _centred_product(x.codes, packed, scale, zero, spec, implementation)
    rows = jnp.concatenate([x.codes, jnp.ones((1, spec.k), jnp.int8)])
    y = _centred_product(rows, packed, scale, zero, spec, implementation)
    return x.scale * (y[:-1] - x.zero * y[-1:])


def _centred_product(x, packed, scale, zero, spec, implementation):
    """x W^T in float32: kernels subtract the middle code, what is left of the zero point meets the sums of x."""
    scale = scale.astype(jnp.float32)
    y = _dispatch(x, packed, scale, spec, implementation)
    if zero is None:
        return y
    sums = x.reshape(x.shape[0], spec.groups, -1).sum(-1, dtype=jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    rest = scale * (zero.astype(jnp.float32) - spec.centre)
    return y - jnp.einsum("mg,ng->mn", sums.astype(jnp.float32), rest, precision=lax.Precision.HIGHEST)


def _dispatch(x, packed, scale, spec, implementation):
    if implementation is not None:
        return _run(choose(spec, x, packed, implementation).name, x, packed, scale, spec)
    chosen = {platform: choose(spec, x, packed, names, False).name for platform, names in preference().items()}
    branches = {p: functools.partial(_run, name, spec=spec) for p, name in chosen.items() if name != "xla"}
    xla_branch = functools.partial(_run, "xla", spec=spec)
    if not branches:
        return xla_branch(x, packed, scale)
    return lax.platform_dependent(x, packed, scale, **branches, default=xla_branch)


def _run(name, x, packed, scale, spec):
    chosen = BACKENDS[name]
    tile = tiles.chosen(name, spec, x, chosen.tiles(spec, x))
    options = {} if tile is None else {"tile": tile}
    return chosen.matmul(x, layouts.convert(_prepared(packed), chosen.layouts(spec), spec), scale, spec, **options)


def _refusal(candidate: Backend, spec, x, packed, convert) -> str | None:
    known = candidate.layouts(spec)
    layout = _prepared(packed).layout
    if layout in known or candidate.name == "xla" or (layout == "dense" and convert):
        return candidate.refuse(spec, x)
    return f"the weight has layout {layout!r}, expected {' or '.join(map(repr, known))}: use `prepare`"


def _prepared(packed: jax.Array | Prepared) -> Prepared:
    return packed if isinstance(packed, Prepared) else Prepared(packed, "dense")
