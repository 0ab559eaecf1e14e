"""Structured synthetic heads: sinks, local bands, moving diagonals, heavy hitters and topics, in known proportions.

Trained heads spread most of their mass over few keys but many tiles; these do too: at 8192 tokens 95 % of the mass needs 36 to
67 % of the causal 64 x 64 tiles but 2 to 17 % of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SINKS = 4  # first tokens
FREQUENCIES = np.geomspace(1.5, 0.01, 6)  # of the positional features, radians per token


class Weights(NamedTuple):
    """Strength of each feature in the logits."""

    sink: float
    local: float
    slash: float
    heavy: float
    topic: float


KINDS = {
    "mixed": Weights(0.9, 9, 7, 11, 6),
    "vertical": Weights(0.8, 8, 0, 12, 3),
    "slash": Weights(0.8, 9, 11, 4, 0),
    "local": Weights(0.9, 12, 0, 5, 0),
    "stripe": Weights(1, 10, 0, 10, 8),
    "topic": Weights(0.8, 9, 0, 6, 10),
}


class Head(NamedTuple):
    """Queries, keys and values of one head after the positional embedding, float32."""

    query: Float[np.ndarray, "N d"]
    key: Float[np.ndarray, "N d"]
    value: Float[np.ndarray, "N d"]


def seed_of(kind: str, seed: int) -> int:
    """Seed of a head: 100 seed + index of its kind."""
    return 100 * seed + list(KINDS).index(kind)


def synthetic_head(kind: str, length: int, seed: int, depth: int = 64) -> Head:
    """One head of a kind of `KINDS`.

    Each feature has columns of its own in a random orthonormal frame, so a logit is the sum of all f_q . f_k, plus noise.

    Raises:
      ValueError: unknown kind, or fewer than 36 columns.
    """
    if kind not in KINDS or depth < 36:
        raise ValueError(f"expected a kind of {', '.join(KINDS)} and depth >= 36, found {kind!r} and {depth}")
    weights, rng = KINDS[kind], np.random.default_rng(seed_of(kind, seed))
    frame = np.linalg.qr(rng.standard_normal((depth, depth)))[0]
    appetite = _appetite(rng, length, kind)
    pairs = [_sink(weights, appetite, length), *_positional(rng, weights, length)]
    pairs += [_heavy_hitters(rng, weights, appetite), _topics(rng, weights, appetite)]
    features = [np.concatenate(part, axis=1) for part in zip(*pairs, strict=True)]
    scale = depth**0.25
    noisy = zip(features, (0.4, 0.1), strict=True)
    query, key = (scale * (f @ frame[: f.shape[1]] + n * rng.standard_normal((length, depth))) for f, n in noisy)
    value = rng.standard_normal((length, depth))
    value[:SINKS] *= 0.05
    return Head(*(x.astype(np.float32) for x in (query, key, value)))


def _appetite(rng: np.random.Generator, length: int, kind: str) -> Float[np.ndarray, "N"]:
    """How much a row wants of the history: few rows want all."""
    share, low, high = (0.12, 0.0, 0.15) if kind == "stripe" else (0.15, 0.2, 0.7)
    return np.where(rng.random(length) < share, 1.0, rng.uniform(low, high, length))


def _sink(weights: Weights, appetite: Float[np.ndarray, "N"], length: int) -> tuple[np.ndarray, np.ndarray]:
    query = weights.sink * (np.log(length) + 1) * (1.25 - appetite)
    return query[:, None], (np.arange(length) < SINKS).astype(float)[:, None]


def _positional(rng, weights: Weights, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The local band, and the same moved by one distance."""
    waves = lambda place: np.concatenate([f(place[:, None] * FREQUENCIES) for f in (np.cos, np.sin)], axis=1)
    place = np.arange(length)
    shift = rng.integers(200, 900)
    scale = 1 / len(FREQUENCIES)
    moved = weights.slash * scale * waves(place - shift)
    return [(weights.local * scale * waves(place), waves(place)), (moved, waves(place))]


def _heavy_hitters(rng, weights: Weights, appetite: Float[np.ndarray, "N"]) -> tuple[np.ndarray, np.ndarray]:
    """Three families of rare keys that all rows of a span prefer alike."""
    length, families = len(appetite), 3
    strength = np.clip(rng.lognormal(-0.1, 0.3, length), 0, 1.5) * (rng.random(length) < 0.004)
    key = np.eye(families)[rng.integers(families, size=length)] * strength[:, None]
    span = spans(rng, length)
    preference = rng.dirichlet([0.7] * families, size=span[-1] + 1)[span]
    return weights.heavy * appetite[:, None] * preference, key


def _topics(rng, weights: Weights, appetite: Float[np.ndarray, "N"]) -> tuple[np.ndarray, np.ndarray]:
    """Eight topics that come and go; rows look for salient keys of theirs."""
    length, count = len(appetite), 8
    span = spans(rng, length)
    topic = np.eye(count)[rng.integers(count, size=span[-1] + 1)[span]]
    salience = np.where(rng.random(length) < 0.06, 1.0, rng.uniform(0, 0.2, length))
    return weights.topic * appetite[:, None] * topic, salience[:, None] * topic


def spans(rng: np.random.Generator, length: int) -> Int[np.ndarray, "N"]:
    """Number of the span of each token; spans have 100 to 599 tokens."""
    sizes = rng.integers(100, 600, size=length // 100 + 1)
    return np.repeat(np.arange(len(sizes)), sizes)[:length]
