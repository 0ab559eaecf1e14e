"""The public functions, and what they may run on.

    python -c "from pallas_kernels.convolution import build; print(build())"

XLA's convolution on CPU is fast only where the output channels are a multiple of 16, and computes bfloat16 in float32. The
C++ kernel takes any number of channels and multiplies bfloat16 in pairs where the machine can; it must have been built.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import native
from pallas_kernels.convolution.epilogue import ACTIVATIONS, JOINS, Epilogue, View, Window

BACKENDS = ("cpu_ffi", "xla")
_TARGET = "pallas_kernels_convolution"
LIBRARY = native.Library(pathlib.Path(__file__).with_name("cpu_ffi.cc"), ((_TARGET, "Convolution"),))
is_built, build = LIBRARY.is_built, LIBRARY.build
_IDENTITY, _SAME = Epilogue(), Window()


def convolution(
    x: Float[Array, "N H W I"],
    kernel: Float[Array, "h w I O"],
    implementation: str | None = None,
    window: Window = _SAME,
) -> Float[Array, "N y x O"]:
    """Correlation with zeros around the map, float32 sums, dtype of x.

    Args:
      x: float32 or bfloat16.
      kernel: of the same dtype, h and w odd unless the window says its padding.
      implementation: one of `BACKENDS`; None takes the C++ kernel on CPU if it has been built, else XLA. Gradients are
        XLA's.
      window: stride and padding; the default keeps the size.

    Raises:
      ValueError: shapes, dtypes or the implementation are wrong.
      RuntimeError: "cpu_ffi" is asked for and cannot be built.
    """
    _check([x], kernel, window)
    if implementation not in (None, *BACKENDS):
        raise ValueError(f"implementation {implementation!r} is unknown; expected one of {BACKENDS} or None")
    if implementation == "xla" or (implementation is None and not LIBRARY.is_built()):
        return _xla(x, kernel, window)
    cpu, library = (functools.partial(run, window=window) for run in (_plain, _xla))
    return lax.platform_dependent(x, kernel, cpu=cpu, default=library)


def fused_convolution(
    views: Sequence[View],
    kernel: Float[Array, "h w I O"],
    bias: Float[Array, "O"] | None = None,
    other: Float[Array, "N y x O"] | None = None,
    epilogue: Epilogue = _IDENTITY,
    window: Window = _SAME,
) -> Float[Array, "N y x O"]:
    """`epilogue(convolution(the views side by side, kernel), bias, other)`: on CPU one C++ call that rounds once, else XLA.

    Args:
      views: maps of one dtype, float32 or bfloat16, and one size; I channels in all, of each but the last an even number.
      kernel: of the same dtype, h and w odd unless the window says its padding.
      bias: None is zero.
      other: the map that the epilogue joins, of another height and width if it resizes it; None exactly if it joins none.
      window: stride and padding; the default keeps the size.

    Raises:
      ValueError: shapes or dtypes are wrong.
      RuntimeError: the kernel cannot be built.
    """
    _check([jax.eval_shape(lambda v=view: v.map[..., v.start : v.stop]) for view in views], kernel, window)
    _check_views(views)
    bias = jnp.zeros(kernel.shape[3:], kernel.dtype) if bias is None else bias
    _check_epilogue(epilogue, bias, other, window.of(views[0].map.shape, kernel.shape), kernel.dtype)
    maps = [*(view.map for view in views), *([] if other is None else [other])]
    options = dict(spans=tuple((view.start, view.stop) for view in views), epilogue=epilogue, window=window)
    library = functools.partial(_definition, **options, sums=kernel.dtype)
    return lax.platform_dependent(kernel, bias, *maps, cpu=functools.partial(_cpu_ffi, **options), default=library)


def _xla(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    strides, padding = (window.stride,) * 2, window.around(kernel.shape)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _definition(kernel, bias, *maps, spans, epilogue, window, sums=jnp.float32) -> jax.Array:
    x = jnp.concatenate([map[..., start:stop] for map, (start, stop) in zip(maps, spans, strict=False)], axis=-1)
    return epilogue(_xla(x.astype(sums), kernel.astype(sums), window), bias, maps[-1]).astype(kernel.dtype)


def _plain(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    bias = jnp.zeros(kernel.shape[3:], kernel.dtype)
    return _cpu_ffi(kernel, bias, x, spans=((0, x.shape[3]),), epilogue=_IDENTITY, window=window)


def _cpu_ffi(kernel, bias, *maps, **options) -> jax.Array:
    call = jax.custom_jvp(functools.partial(_call, **options))
    definition = functools.partial(_definition, **options)
    call.defjvp(lambda primals, tangents: jax.jvp(definition, primals, tangents))
    return call(kernel, bias, *maps)


def _call(kernel, bias, *maps, spans, epilogue, window) -> jax.Array:
    LIBRARY.register()
    out = jax.ShapeDtypeStruct(window.of(maps[0].shape, kernel.shape), kernel.dtype)
    return jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")(
        kernel,
        bias,
        *maps,
        starts=np.array([start for start, _ in spans], np.int64),
        widths=np.array([stop - start for start, stop in spans], np.int64),
        stride=np.int64(window.stride),
        padding=np.array([before for before, _ in window.around(kernel.shape)], np.int64),
        activation=np.int32(ACTIVATIONS.index(epilogue.activation)),
        join=np.int32(JOINS.index(epilogue.join)),
        slope=np.float32(epilogue.slope),
    )


def _check(maps: Sequence[jax.Array], kernel: jax.Array, window: Window) -> None:
    found = f"{', '.join(f'x {x.dtype} {x.shape}' for x in maps)}, kernel {kernel.dtype} {kernel.shape}"
    dtypes = {kernel.dtype, *(x.dtype for x in maps)}
    if len(dtypes) > 1 or kernel.dtype.name not in ("float32", "bfloat16"):
        raise ValueError(f"expected float32 or bfloat16, the same for both, found {found}")
    odd = kernel.ndim == 4 and (window.padding is not None or (kernel.shape[0] % 2 and kernel.shape[1] % 2))
    sizes = {x.shape[:3] for x in maps if x.ndim == 4}
    if not odd or len(sizes) != 1 or any(x.ndim != 4 for x in maps) or sum(x.shape[3] for x in maps) != kernel.shape[2]:
        raise ValueError(
            f"expected x [N, H, W, I] and a kernel [h, w, I, O], h and w odd without a padding, found {found}"
        )
    if window.stride < 1 or not window.inside(kernel.shape) or min(window.of(maps[0].shape, kernel.shape)) < 1:
        raise ValueError(
            f"expected a stride of at least 1, less padding than kernel, and a result, found {window}, {found}"
        )


def _check_views(views: Sequence[View]) -> None:
    found = [(view.start, view.stop) for view in views]
    inside = all(0 <= view.start < view.stop <= view.map.shape[3] for view in views)
    if not inside or any((stop - start) % 2 for start, stop in found[:-1]):
        raise ValueError(
            f"expected ranges inside their maps, all but the last of an even number of channels, found {found}"
        )


def _check_epilogue(epilogue: Epilogue, bias, other, shape: tuple[int, ...], dtype) -> None:
    joined = shape
    if epilogue.join == "add_resized" and other is not None and other.ndim == 4:
        joined = (shape[0], *other.shape[1:3], shape[3])
    wanted = [(shape[3:], dtype)] + [(joined, dtype)] * (epilogue.join != "none")
    found = [(array.shape, array.dtype) for array in (bias, other) if array is not None]
    if wanted != found:
        raise ValueError(f"{epilogue}: expected a bias, and a map where it joins one, {wanted}, found {found}")
