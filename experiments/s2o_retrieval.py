"""Needles: one key that the last queries look for, at every depth of a head full of other structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.s2o_operator import Method, arrays, runner
from jaxcomp.attention.heads import SINKS, Head, synthetic_head

CHOICES = 100  # values that an answer may be
MARGIN = 3.0  # nats by which the needle outweighs all other keys


def needle_head(length: int, depth: float, asking: int, seed: int) -> tuple[Head, int]:
    """(a mixed head whose last `asking` queries look for one more key, its place); depth 0 follows the sink, 1 is the last key.

    The needle lies along the direction in which the head's keys vary least, so no other key answers to it.
    """
    query, key, value = synthetic_head("mixed", length, seed)
    root, reach = query.shape[1] ** 0.5, 4.0
    place = SINKS + round(depth * (length - asking - 1 - SINKS))
    direction = np.linalg.svd(key, full_matrices=False)[2][-1]
    key[place] = reach * root * direction
    others = np.delete(np.arange(length - asking), place)
    for row in range(length - asking, length):
        seen = np.concatenate([others, np.arange(length - asking, row + 1)])
        scores = query[row] @ key[seen].T / root
        rest = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        query[row] += direction * (rest + MARGIN - query[row] @ key[place] / root) / reach
    return Head(query, key, value), place


def recalled(head: Head, place: int, output: np.ndarray, asking: int, seed: int) -> float:
    """Share of asking rows whose output points at the needle's value rather than at one of 99 others."""
    others = np.random.default_rng(seed).choice(
        np.delete(np.arange(SINKS, len(head.value)), place - SINKS), CHOICES - 1
    )
    book = head.value[[place, *others]]
    book = book / np.linalg.norm(book, axis=1, keepdims=True)
    return float((np.argmax(output[-asking:] @ book.T, axis=1) == 0).mean())


def threshold_for(method: Method, head: Head, density: float) -> float:
    """Of the method's thresholds the one whose density on a head is nearest to the wanted one, in logarithms."""
    method_of, thresholds = method
    run = lambda t: float(runner(method_of)(t, *arrays(head))[1].value_density[0])
    return min(thresholds, key=lambda t: abs(np.log(max(run(t), 1e-9) / density)))


def needles(
    methods: Mapping[str, Method], length: int, depths: Sequence[float], asking: int, density: float, seed: int
) -> dict[str, dict[str, list[float]]]:
    """{method: {"recall": one per depth, "density": one per depth}} at about one density."""
    heads = [needle_head(length, depth, asking, seed) for depth in depths]
    out = {}
    for name, method in methods.items():
        threshold = threshold_for(method, heads[len(heads) // 2][0], density)
        found = {"recall": [], "density": []}
        for head, place in heads:
            result, stats = runner(method[0])(threshold, *arrays(head))
            found["recall"].append(recalled(head, place, np.asarray(result)[:, 0], asking, seed))
            found["density"].append(float(jnp.mean(stats.value_density)))
        out[name] = found
    return out
