"""Recall by depth of a decoder that was trained to copy, its prefill dense or sparse, for `experiments.s2o`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import recall as task
from experiments.s2o_language import logits_and_density
from jaxcomp.io import huggingface
from jaxcomp.models import Llama

TOGETHER = "all at once"


class Recalled(NamedTuple):
    """One threshold: share of values read, and for each question the share of asked symbols that were right, per repeat."""

    threshold: float
    density: float
    recall: dict[str, list[float]]


def load(folder: str) -> tuple[Llama, Any]:
    """(decoder, params) of `experiments.train_recall`."""
    config, params = huggingface.load_pretrained(folder, dtype=jnp.float32)
    return Llama(config), params


def questions(config: ConfigDict, length: int) -> dict[str, list[task.Episode]]:
    """Episodes of held-out text: a passage at each depth, asked alone; and passages at all depths, asked together."""
    text = task.ascii_codes("validation")
    sizes = dict(span=config.span, prompt=config.prompt, symbols=config.symbols)
    asked = {f"depth {depth:g}": [depth] for depth in config.depths} | {TOGETHER: list(config.depths)}
    draw = lambda depths, seed: task.question(np.random.default_rng((length, seed)), text, length, depths, **sizes)
    return {name: [draw(depths, seed) for seed in range(config.repeats)] for name, depths in asked.items()}


def answers(
    decoder: tuple[Llama, Any],
    attend_of: Callable[[Any], Any],
    thresholds: Sequence[float],
    asked: Mapping[str, Sequence[task.Episode]],
) -> list[Recalled]:
    """One result per threshold; `attend_of` makes an `attend` of it."""
    model, params = decoder

    @jax.jit
    def run(threshold, tokens):
        logits, density = logits_and_density(model, attend_of(threshold), params, tokens)
        return logits.argmax(-1), density

    results = []
    for threshold in thresholds:
        found, densities = {}, []
        for name, episodes in asked.items():
            guesses = [jax.device_get(run(jnp.float32(threshold), jnp.asarray(e.tokens))) for e in episodes]
            found[name] = [right(guess, e) for (guess, _), e in zip(guesses, episodes, strict=True)]
            densities += [float(density) for _, density in guesses]
        results.append(Recalled(float(threshold), float(np.mean(densities)), found))
    return results


def right(guess: np.ndarray, episode: task.Episode) -> float:
    """Share of asked tokens that the guess at the token before got right."""
    asked = episode.asked[1:]
    return float((guess[:-1] == episode.tokens[1:])[asked].mean())


def nearest(results: Sequence[Recalled], density: float) -> Recalled:
    """The run whose density is nearest to the wanted one, in logarithms."""
    return min(results, key=lambda r: abs(np.log(r.density / density)))


def kept(result: Recalled, dense: Recalled) -> float:
    """The least share of dense recall that is left of a question, means over repeats."""
    return min(float(np.mean(result.recall[name]) / np.mean(dense.recall[name])) for name in dense.recall)


def least_density(results: Sequence[Recalled], dense: Recalled, share: float) -> float | None:
    """Density of the sparsest run that keeps a share of dense recall for every question; None if none does."""
    return min((r.density for r in results if kept(r, dense) >= share), default=None)
