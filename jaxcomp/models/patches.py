"""Images, latents and videos as tokens: one per patch."""

import functools
import math

from jaxtyping import Array, Float


@functools.cache
def token_grid(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens along each axis of an input of `size` cut into patches. Raises ValueError if a patch does not divide its axis."""
    if len(size) != len(patch) or any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"input {size} is not divisible into patches {patch}; pad it or choose another patch")
    return tuple(n // p for n, p in zip(size, patch, strict=True))


def patchify(x: Float[Array, "B *size C"], patch: tuple[int, ...]) -> Float[Array, "B L P"]:
    """Tokens of the patches in row order; within a patch the channel runs fastest."""
    batch, *size, channels = x.shape
    n = len(patch)
    cut = x.reshape(batch, *(part for s, p in zip(size, patch, strict=True) for part in (s // p, p)), channels)
    cut = cut.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return cut.reshape(batch, -1, math.prod(patch) * channels)


def unpatchify(
    tokens: Float[Array, "B L P"], grid: tuple[int, ...], patch: tuple[int, ...]
) -> Float[Array, "B *size C"]:
    """The inverse of `patchify`."""
    n = len(patch)
    cut = tokens.reshape(tokens.shape[0], *grid, *patch, -1)
    cut = cut.transpose(0, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)), 2 * n + 1)
    return cut.reshape(tokens.shape[0], *(g * p for g, p in zip(grid, patch, strict=True)), -1)
