"""A denoiser cut where caches attach: embed / trunk / head, and what wraps one (guidance, other cuts)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Around = Callable[[str, Callable[[Any], Any], Any], Any]


def call(name: str, fn: Callable[[Any], Any], h: Any) -> Any:
    """The default `around`: runs the module."""
    del name
    return fn(h)


class Denoiser(NamedTuple):
    """A network out = head(trunk(embed(x, t, cond))) of which a cached step skips (parts of) the trunk.

    Attributes:
      embed: `embed(params, x, t, cond) -> (h, c)`: x [B, ...], t f32[B]; h goes through the trunk, c is all else it needs. Cheap.
      trunk: `trunk(params, h, c, around) -> h'`, shaped as h. It calls `around(name, fn, h)` in place of `fn(h)` for every
        module that a cache may skip ("blocks_3", "blocks_3/attn", "blocks_3/mlp"), from a plain Python loop.
      head: `head(params, h', c) -> out`, shaped as x. Cheap.
    """

    embed: Callable[[Any, Array, Array, Any], tuple[Any, Any]]
    trunk: Callable[[Any, Any, Any, Around], Any]
    head: Callable[[Any, Any, Any], Array]


def whole(fn: Callable[[Any, Array, Array, Any], Array]) -> Denoiser:
    """`fn(params, x, t, cond) -> out` as a denoiser that is all trunk."""
    return Denoiser(
        embed=lambda params, x, t, cond: (x, (t, cond)),
        trunk=lambda params, h, c, around: fn(params, h, *c),
        head=lambda params, h, c: h,
    )


def at_output(denoiser: Denoiser) -> Denoiser:
    """The same network with the cut at its output: h is x, h' is out, and a cached step skips all of it."""

    def trunk(params, x, c, around):
        h, inner = denoiser.embed(params, x, *c)
        return denoiser.head(params, denoiser.trunk(params, h, inner, around), inner)

    return whole(lambda *_: None)._replace(trunk=trunk)


def guided(denoiser: Denoiser, scale: float, null: Any) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598): out = uncond + scale (cond - uncond), on a batch of [uncond; cond].

    Args:
      denoiser: of conditional and unconditional samples.
      scale: guidance weight; 1 is the plain conditional model.
      null: the condition that means "none": a pytree like `cond` without batch axis, say `jnp.int32(10)` for class labels.

    Raises:
      ValueError: `null` is None: the model has no unconditional branch to guide with.
    """
    if null is None:
        raise ValueError(
            "guidance needs an unconditional branch: expected `null` (the condition that means 'none', as used in training), "
            "found None; train with dropped conditions or sample without guidance"
        )

    def embed(params, x, t, cond):
        if cond is None:
            raise ValueError("guidance needs a condition: expected `cond` with a leading batch axis, found None")
        double = lambda a, b: jnp.concatenate([jnp.broadcast_to(jnp.asarray(a, b.dtype), b.shape), b])
        return denoiser.embed(params, double(x, x), double(t, t), jax.tree.map(double, null, cond))

    def head(params, h, c):
        uncond, conditional = jnp.split(denoiser.head(params, h, c), 2)
        return uncond + jnp.asarray(scale, uncond.dtype) * (conditional - uncond)

    return Denoiser(embed, denoiser.trunk, head)


def module_outputs(trunk: Callable[[Around], Any], pattern: str) -> tuple[Any, dict[str, Any]]:
    """Runs `trunk(around)` and keeps the outputs of the modules whose whole name matches.

    Returns:
      (what the trunk returned, {name: output}).

    Raises:
      ValueError: no module matches.
    """
    seen, kept = [], {}

    def around(name, fn, h):
        seen.append(name)
        out = fn(h)
        if re.fullmatch(pattern, name):
            kept[name] = out
        return out

    result = trunk(around)
    if not kept:
        raise ValueError(f"no module of the trunk matches {pattern!r}; it has {seen[:8]}{' ...' if seen[8:] else ''}")
    return result, kept


def recut(denoiser: Denoiser, first: int, last: int = 0, blocks: str = r"blocks_\d+") -> Denoiser:
    """Moves the first and the last blocks of a trunk, which always run, into `embed` and `head`.

    The new c is (c, change that the first blocks made to h). For trunks that are a plain chain of blocks.

    Args:
      denoiser: its trunk calls `around` for each block.
      first: blocks moved into `embed`, at least 1.
      last: blocks moved into `head`.
      blocks: names of the blocks, in order of their calls.

    Raises:
      ValueError: no block is left in the trunk (when sampled), or first < 1.
    """
    if first < 1 or last < 0:
        raise ValueError(f"expected first >= 1 and last >= 0, got {first} and {last}")

    def part(params, h, c, run: Callable[[int, int], bool], around: Around = call):
        trunk = lambda around: denoiser.trunk(params, h, c, around)
        names: list[str] = []
        jax.eval_shape(lambda: trunk(lambda name, fn, h: names.append(name) or h))
        order = {name: i for i, name in enumerate(n for n in names if re.fullmatch(blocks, n))}
        if first + last >= len(order):
            raise ValueError(f"{first} first and {last} last blocks leave none of {len(order)} that match {blocks!r}")
        inside = lambda name: name not in order or run(order[name], len(order))
        return trunk(lambda name, fn, h: around(name, fn, h) if inside(name) else h)

    def embed(params, x, t, cond):
        h, c = denoiser.embed(params, x, t, cond)
        new = part(params, h, c, lambda i, n: i < first)
        return new, (c, new - h)

    def trunk(params, h, c, around):
        return part(params, h, c[0], lambda i, n: first <= i < n - last, around)

    def head(params, h, c):
        return denoiser.head(params, part(params, h, c[0], lambda i, n: i >= n - last) if last else h, c[0])

    return Denoiser(embed, trunk, head)


def exposing(denoiser: Denoiser, module: str) -> Denoiser:
    """Adds what one module of the trunk gets as its input to c, which becomes (c, input); nothing behind it is run for that.

    Raises:
      ValueError: the trunk has no such module (when sampled).
    """

    def embed(params, x, t, cond):
        h, c = denoiser.embed(params, x, t, cond)
        found = []

        def around(name, fn, v):
            if name == module:
                found.append(v)
            return fn(v) if module.startswith(f"{name}/") and not found else v

        denoiser.trunk(params, h, c, around)
        if not found:
            raise ValueError(f"the trunk has no module {module!r}; name one that it shows to `around`")
        return h, (c, found[0])

    return Denoiser(
        embed,
        lambda params, h, c, around: denoiser.trunk(params, h, c[0], around),
        lambda params, h, c: denoiser.head(params, h, c[0]),
    )
