"""Head counts of real models, and queries, keys and values with the structure that attention maps show."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Heads of one layer: query heads, key heads, head dimensions."""

    name: str
    query_heads: int
    key_heads: int
    dim: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama3.1-8b", 32, 8, 128),
        Shape("llama3.1-8b/group", 4, 1, 128),  # one key head and its queries: an eighth of a layer
        Shape("qwen3-4b/group", 4, 1, 128),
        Shape("tiny", 4, 2, 48),
    )
}
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)

# weights of (sink, local window, slash, heavy hitters, topics)
KINDS = {
    "mixed": (0.9, 9, 7, 11, 6),
    "vertical": (0.8, 8, 0, 12, 3),
    "slash": (0.8, 9, 11, 4, 0),
    "local": (0.9, 12, 0, 5, 0),
    "stripe": (1.0, 10, 0, 10, 8),
    "topic": (0.8, 9, 0, 6, 10),
}
_FREQUENCIES = np.geomspace(1.5, 0.01, 6)


def structured_heads(rng: np.random.Generator, length: int, shape: Shape, kinds: tuple[str, ...] = tuple(KINDS)):
    """float32 q [Hq, N, d], k and v [Hk, N, d]: sinks, windows, diagonals, heavy hitters and topics as explicit features.

    Key head i is of kind i modulo their number. Every feature owns directions of an orthonormal frame, so its
    logit is the product of a query's and a key's share of it; rows differ in their appetite for anything but the sink.

    Raises:
      ValueError: d < 36, which does not hold the features.
    """
    if shape.dim < 36:
        raise ValueError(f"{shape.name}: heads of {shape.dim} dimensions do not hold 36 features; use 36 or more")
    group = shape.query_heads // shape.key_heads
    heads = [_group(rng, length, shape.dim, group, kinds[i % len(kinds)]) for i in range(shape.key_heads)]
    q, k, v = zip(*heads, strict=True)
    return np.concatenate(q), np.stack(k), np.stack(v)


def _group(rng, n, d, group, kind):
    """q [group, N, d], k and v [N, d] of one key head."""
    frame, gain = np.linalg.qr(rng.standard_normal((d, d)))[0], d**0.25
    hits, topics, delta = _hitters(rng, n), _topics(rng, n), int(rng.integers(200, 900))
    keys = np.concatenate(
        [(np.arange(n) < 4)[:, None], _rotary(np.arange(n)), _rotary(np.arange(n)), hits, topics[1]], 1
    )
    queries = [_queries(rng, n, kind, delta, topics[0]) for _ in range(group)]
    basis = frame[:, : keys.shape[1]]
    noise = lambda: gain * rng.standard_normal((n, d))
    q = np.stack([gain * f @ basis.T + 0.4 * noise() for f in queries])
    k = gain * keys @ basis.T + 0.1 * noise()
    v = rng.standard_normal((n, d))
    v[:4] *= 0.05
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def _queries(rng, n, kind, delta, topic):
    """Features of the queries of one head."""
    sink, local, slash, hitters, topics = KINDS[kind]
    stripe = kind == "stripe"
    busy = rng.random(n) < (0.12 if stripe else 0.15)
    appetite = np.where(busy, 1.0, rng.uniform(*((0, 0.15) if stripe else (0.2, 0.7)), n))
    family = rng.dirichlet((0.7, 0.7, 0.7), n)[_spans(rng, n)]
    at = np.arange(n)
    return np.concatenate(
        [
            (sink * (np.log(n) + 1) * (1.25 - appetite))[:, None],
            local / 6 * _rotary(at),
            slash / 6 * _rotary(at - delta),
            hitters * appetite[:, None] * family,
            topics * appetite[:, None] * np.eye(8)[topic],
        ],
        1,
    )


def _hitters(rng, n):
    """Rare strong keys of one of three families."""
    strength = np.where(rng.random(n) < 0.004, np.clip(rng.lognormal(-0.1, 0.3, n), 0, 1.5), 0)
    return strength[:, None] * np.eye(3)[rng.integers(0, 3, n)]


def _topics(rng, n):
    """Topic of every position, constant over spans; and the features of its key, of which few are salient."""
    topic = rng.integers(0, 8, n)[_spans(rng, n)]
    salience = np.where(rng.random(n) < 0.06, 1.0, rng.uniform(0, 0.2, n))
    return topic, salience[:, None] * np.eye(8)[topic]


def _spans(rng, n):
    """Number of the span that each position is in; spans have 100 to 599 positions."""
    return np.repeat(np.arange(n // 100 + 1), rng.integers(100, 600, n // 100 + 1))[:n]


def _rotary(position):
    return np.concatenate([f(np.outer(position, _FREQUENCIES)) for f in (np.cos, np.sin)], 1)
