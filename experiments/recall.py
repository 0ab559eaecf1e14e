"""Recall in real text: passages of random symbols come a second time, where a decoder must look back to continue them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxcomp.data import embedded_text


class Episode(NamedTuple):
    """Tokens, and which of them a decoder can only know from the first time."""

    tokens: Int[np.ndarray, "*B T"]
    asked: Bool[np.ndarray, "*B T"]


class Insert(NamedTuple):
    """A passage that goes before `place` of a text; the second time its tokens behind the prompt are asked."""

    place: int
    passage: Int[np.ndarray, "S"]
    again: bool


def ascii_codes(split: str) -> Int[np.ndarray, "T"]:
    """The embedded text as ASCII codes; the few other characters are left out."""
    return np.frombuffer(embedded_text(split).encode("ascii", "ignore"), np.uint8).astype(np.int32)


def excerpt(rng: np.random.Generator, text: Int[np.ndarray, "T"], length: int) -> Int[np.ndarray, "length"]:
    """A random part of a text. Raises ValueError if the text, or the room left for it, is too short."""
    if not 0 <= length < len(text):
        raise ValueError(f"expected 0 to {len(text) - 1} tokens of text, found {length}; use fewer or shorter passages")
    first = rng.integers(len(text) - length)
    return text[first : first + length]


def weave(text: Int[np.ndarray, "T"], inserts: Sequence[Insert], prompt: int) -> Episode:
    """A text with passages in it, in the order given; their places must not fall."""
    edges = [0, *(insert.place for insert in inserts), len(text)]
    head, *between = (text[low:high] for low, high in itertools.pairwise(edges))
    tokens, asked = [head], [np.zeros(len(head), bool)]
    for insert, words in zip(inserts, between, strict=True):
        tokens += [insert.passage, words]
        asked += [insert.again & (np.arange(len(insert.passage)) >= prompt), np.zeros(len(words), bool)]
    return Episode(np.concatenate(tokens).astype(np.int32), np.concatenate(asked))


def lesson(
    rng: np.random.Generator,
    text: Int[np.ndarray, "T"],
    length: int,
    passages: int,
    *,
    span: int,
    prompt: int,
    symbols: tuple[int, int],
) -> Episode:
    """An episode to learn from: every passage of different symbols twice, at random places of a random excerpt."""
    words = excerpt(rng, text, length - 2 * passages * span)
    drawn = [rng.permutation(np.arange(*symbols))[:span] for _ in range(passages)]
    places = np.sort(rng.integers(0, len(words) + 1, 2 * passages))
    turns = rng.permutation(np.repeat(np.arange(passages), 2))
    inserts = [Insert(places[i], drawn[turn], turn in turns[:i]) for i, turn in enumerate(turns)]
    return weave(words, inserts, prompt)


def question(
    rng: np.random.Generator,
    text: Int[np.ndarray, "T"],
    length: int,
    depths: Sequence[float],
    *,
    span: int,
    prompt: int,
    symbols: tuple[int, int],
) -> Episode:
    """An episode to answer: a passage at each of rising depths (0 is the begin of the text, 1 its end), all asked at the end."""
    words = excerpt(rng, text, length - 2 * len(depths) * span)
    drawn = rng.permutation(np.arange(*symbols))[: len(depths) * span].reshape(len(depths), span)
    first = [Insert(round(depth * len(words)), passage, False) for depth, passage in zip(depths, drawn, strict=True)]
    again = [Insert(len(words), drawn[i], True) for i in rng.permutation(len(depths))]
    return weave(words, [*first, *again], prompt)
