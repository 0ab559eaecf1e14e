"""Which operation feeds which weights, and the rescaling of both that keeps the model's function.

A norm gain or a kernel that produces x, and kernels that consume it: dividing the producer by s and multiplying the columns of
every consumer by s changes nothing, x W^T = (x / s)(W diag(s))^T, but moves outliers between activations and weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.quantize.scheme import Target, targets


@dataclasses.dataclass(frozen=True)
class Pair:
    """A producer and all consumers of its output.

    Attributes:
      source: path of a norm gain or of a kernel (whose rows are then divided); a `bias` beside it is divided with it. At most
        one `*`, which stands for any text, slashes included.
      targets: paths of every kernel that reads this output; their `*` is the text that matched in `source`.
      offset: the effective gain is parameter + offset (1 for Gemma's norms).
      optional: pass over places where sizes disagree (v and o under grouped-query attention).
    """

    source: str
    targets: tuple[str, ...]
    offset: float = 0.0
    optional: bool = False


_QKV = ("*/attn/q/kernel", "*/attn/k/kernel", "*/attn/v/kernel")
_GATE_UP = ("*/mlp/gate/kernel", "*/mlp/up/kernel")
# Norms and what reads them, by the names of `jaxcomp.models.Llama`; Gemma's gains are 1 + scale; kernels that feed kernels.
LLAMA = (Pair("*/attn_norm/scale", _QKV), Pair("*/mlp_norm/scale", _GATE_UP))
GEMMA = tuple(dataclasses.replace(pair, offset=1.0) for pair in LLAMA)
LINEAR = (
    Pair("*/attn/v/kernel", ("*/attn/o/kernel",), optional=True),
    Pair("*/mlp/up/kernel", ("*/mlp/down/kernel",)),
)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A pair at one place of a tree.

    Attributes:
      source: path of the producer.
      producer: the producer as a matrix if it is a kernel, None for a norm gain.
      consumers: the kernels that read its output.
      offset: as in `Pair`.
    """

    source: str
    producer: Target | None
    consumers: tuple[Target, ...]
    offset: float


def bind(params: Any, pairs: Sequence[Pair], stats: Any) -> list[Bound]:
    """Finds the places of a tree that the pairs describe.

    Raises:
      ValueError: a pair matches nothing; a member is missing, compressed, frozen or unused; sizes disagree. Messages name paths.
    """
    leaves = leaves_with_paths(params)
    places = [(pair, wild) for pair in pairs for wild in _wildcards(pair, leaves)]
    usage = stats.usage(params)
    for pair, wild in places:
        _check_members(pair, wild, leaves, usage)
    members = {m.replace("*", wild) for pair, wild in places for m in (pair.source, *pair.targets)}
    kernels = [Rule("re:" + re.escape(path)) for path in sorted(members & set(usage))]
    views = {t.path: t for t in targets(params, kernels, {}, stats)}
    bound = (_bind_one(pair, wild, leaves, views) for pair, wild in places)
    return [place for place in bound if place is not None]


def measure(stats: Any, params: Any, places: Sequence[Bound], needs: set[str]) -> list[Mapping[str, jax.Array]]:
    """Statistics of the input that the consumers of each place share.

    Raises:
      ValueError: an input cannot be observed (grouped convolution, or inside a `while` loop).
    """
    inputs = [place.consumers[0].path for place in places]
    measured = stats(params, needs, only=set(inputs).__contains__)
    if missing := [path for path in inputs if path not in measured]:
        raise ValueError(f"{missing[0]}: no statistics of its input could be taken; leave its pair out")
    return [measured[path] for path in inputs]


def rescale(params: Any, places: Sequence[Bound], scales: Sequence[Float[Array, "*b k"]], stats: Any) -> Any:
    """Divides every producer by its scale and multiplies the columns of its consumers by it. Exact but for rounding.

    Raises:
      ValueError: the model's outputs on the first calibration batch change: the pairs do not describe this model.
    """
    new = dict(leaves_with_paths(params))
    for place, s in zip(places, scales, strict=True):
        for t in place.consumers:
            new[t.path] = _scale_matrix(new[t.path], t, s[..., None, :])
        if place.producer is None:
            gain = new[place.source].astype(jnp.float32)
            new[place.source] = ((gain + place.offset) / s - place.offset).astype(new[place.source].dtype)
        else:
            new[place.source] = _scale_matrix(new[place.source], place.producer, 1 / s[..., None])
        bias = _bias_of(place.source)
        if bias in new:
            new[bias] = (new[bias].astype(jnp.float32) / s.reshape(new[bias].shape)).astype(new[bias].dtype)
    out = replace_leaves(params, new)
    _check_preserved(stats, params, out)
    return out


def _wildcards(pair: Pair, leaves: Mapping[str, Any]) -> list[str]:
    """What `*` stands for at each match of the source ("" for a source without one)."""
    wild = "*" in pair.source
    if pair.source.count("*") > 1 or (not wild and any("*" in t for t in pair.targets)):
        raise ValueError(f"{pair}: one '*' in the source, repeated in the targets, is what a pair may have")
    regex = re.compile(re.escape(pair.source).replace(r"\*", "(.*)") + ("" if wild else "()"))
    if found := [m[1] for path in leaves if (m := regex.fullmatch(path))]:
        return found
    raise ValueError(
        f"pair source {pair.source!r} matches no leaf; the nearest paths are {_nearest(pair.source, leaves)}; "
        "pass pairs=(Pair(source, targets), ...) with the names of this model"
    )


def _check_members(pair: Pair, wild: str, leaves: Mapping[str, Any], usage: Mapping[str, Any]) -> None:
    for member in (pair.source, *pair.targets):
        path = member.replace("*", wild)
        if path not in leaves:
            raise ValueError(f"pair member {path!r} is not in the tree; the nearest paths are {_nearest(path, leaves)}")
        if is_compressed(leaves[path]):
            found = type(leaves[path]).__name__
            raise ValueError(
                f"{path}: expected a dense array to rescale, found {found}; rescale before other transforms"
            )
        if member is not pair.source and path not in usage:
            raise ValueError(
                f"{path}: the model multiplies nothing with it on the calibration data; fix the pair's targets"
            )


def _bind_one(pair: Pair, wild: str, leaves: Mapping[str, Any], views: Mapping[str, Target]) -> Bound | None:
    source = pair.source.replace("*", wild)
    consumers = tuple(views[t.replace("*", wild)] for t in pair.targets)
    producer = views.get(source)
    width = tuple(leaves[source].shape) if producer is None else producer.matrix.shape[:-1]
    for t in consumers:
        want = (*t.matrix.shape[:-2], t.matrix.shape[-1])
        if width != want and pair.optional:
            return None
        if width != want:
            raise ValueError(
                f"{source} produces {width}, but {t.path} consumes {want}; fix the pair or mark it optional"
            )
    return Bound(source, producer, consumers, pair.offset)


def _scale_matrix(leaf: jax.Array, view: Target, s: Float[Array, "*b n k"]) -> jax.Array:
    scaled = view.layout.to_matrix(leaf.astype(jnp.float32)) * s
    return view.layout.to_array(scaled).astype(leaf.dtype)


def _bias_of(path: str) -> str:
    """The bias beside a gain or kernel."""
    return re.sub(r"[^/]+(/value)?$", r"bias\1", path)


def _check_preserved(stats: Any, before: Any, after: Any) -> None:
    run = jax.jit(compressed(stats.apply))
    with jax.default_matmul_precision("highest"):
        old, new = (jax.tree.leaves(run(params, stats.batches[0])) for params in (before, after))
    floats = [x.dtype for x in [*jax.tree.leaves(before), *old] if jnp.issubdtype(x.dtype, jnp.floating)]
    tolerance = max(1e-3, max(float(jnp.finfo(dtype).eps) for dtype in floats) ** 0.5)
    for a, b in zip(old, new, strict=True):
        change = float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30))
        if not change <= tolerance:
            raise ValueError(
                f"rescaling by the pairs changes the model's outputs by {change:.2g} of their largest; either the pairs miss "
                "a consumer of a source, or gains are parameter + 1 (use GEMMA, or Pair(..., offset=1.0))"
            )


def _nearest(path: str, leaves: Mapping[str, Any]) -> list[str]:
    return difflib.get_close_matches(path, list(leaves), n=3, cutoff=0.0)
