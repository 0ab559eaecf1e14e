"""Activations as integer codes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.arbitrary_bit_matmul.packing import check_bits


class ActivationCodes(NamedTuple):
    """Quantized activations: x = (codes - zero) * scale.

    Attributes:
      codes: int8 [M, K], unsigned codes minus 2^(bits - 1).
      scale: float32 [M, 1].
      zero: float32 [M, 1], minus 2^(bits - 1) like the codes; None where it is 0.
    """

    codes: Int8[Array, "m k"]
    scale: Float[Array, "m 1"]
    zero: Float[Array, "m 1"] | None = None

    def values(self) -> Float[Array, "m k"]:
        """The activations after quantization, float32."""
        codes = self.codes.astype(jnp.float32)
        return (codes if self.zero is None else codes - self.zero) * self.scale


def quantize_activations(x: Float[Array, "m k"], bits: int, symmetric: bool = True) -> ActivationCodes:
    """Dynamic quantization per token (ABQ-LLM, arXiv 2408.08554), rounding half to even.

    Symmetric: scale = max|x| / (2^(b-1) - 1). Asymmetric: scale = (max - min) / (2^b - 1) with min <= 0 <= max, zero a code.

    Raises:
      ValueError: bits outside 1..8, or symmetric with 1 bit.
    """
    check_bits(bits)
    if symmetric and bits == 1:
        raise ValueError("symmetric activations need at least 2 bits; use act_symmetric=False")
    x, half, top = x.astype(jnp.float32), 2 ** (bits - 1), 2**bits - 1
    high, low = jnp.maximum(x.max(-1, keepdims=True), 0), jnp.minimum(x.min(-1, keepdims=True), 0)
    step = jnp.maximum(high, -low) / (half - 1) if symmetric else (high - low) / top
    scale = jnp.where(step > 0, step, 1)
    zero = None if symmetric else jnp.clip(jnp.round(-low / scale), 0, top) - half
    codes = jnp.round(x / scale) if zero is None else jnp.round(x / scale) + zero
    return ActivationCodes(jnp.clip(codes, -half, half - 1).astype(jnp.int8), scale, zero)


def split_digits(x: Float[Array, "m k"], digits: int = 3) -> tuple[Int8[Array, "d m k"], Float[Array, "d m 1"]]:
    """x as a sum of int8 digits with one scale per digit and row, highest first.

    x = sum_d scale_d digit_d within max|x| 254^-digits: three digits reach float32 rounding of the row's maximum (2^-24), so a
    product with integer codes can run in exact integer arithmetic.
    """
    top = jnp.abs(x).max(-1, keepdims=True)
    scale = jnp.where(top > 0, top, 1) / 127
    rest, codes = x / scale, []
    for _ in range(digits):
        codes.append(jnp.round(rest))
        rest = (rest - codes[-1]) * 254
    scales = jnp.stack([scale * 254.0**-d for d in range(digits)])
    return jnp.stack(codes).astype(jnp.int8), scales


def join_digits(products: jax.Array, scales: Float[Array, "d m 1"]) -> Float[Array, "m n"]:
    """Products [D, M, N] of the digits summed with their scales."""
    return sum(product * scale for product, scale in zip(products, scales, strict=True))
