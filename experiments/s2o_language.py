"""Sparse prefill of a decoder on long real text: perplexity, and other compression beside it, for `experiments.s2o`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments import lm as experiment
from experiments.lm import LanguageModel
from experiments.s2o_operator import Method
from jaxcomp.attention import apply_attention, capture, dense_attention, try_thresholds
from jaxcomp.core.apply import compressed
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.transform import compress
from jaxcomp.data import token_windows
from jaxcomp.models import Llama
from jaxcomp.quantize import abq, rtn
from jaxcomp.quantize.attention import quantized_attention

DENSE = "dense"


class Scored(NamedTuple):
    """Nats per token of every window, and the share of values read, over layers, heads and windows."""

    nats: list[float]
    density: float


def load(config: ConfigDict) -> tuple[LanguageModel, Int[np.ndarray, "n T"], Int[np.ndarray, "m T"]]:
    """(the decoder, evaluation windows evenly spread over the held-out text, calibration windows)."""
    lm = experiment.load_model(config.model, ConfigDict(dict(dtype="float32", outlier_channels=0)))
    calibration, evaluation = (
        token_windows(lm.tokenizer.encode(text).ids, config.context) for text in experiment.read_texts("embedded")
    )
    spread = np.linspace(0, len(evaluation) - 1, config.windows).round().astype(int)
    return lm, evaluation[spread], calibration[: config.calibration_windows]


def dense_attend(query: Array, key: Array, value: Array, mask: Array, **options: Any) -> tuple[Array, None]:
    """Dense attention in the form of `SparseAttention.attend`; nothing to report."""
    return dense_attention(query, key, value, mask, **options), None


def scorer(lm: LanguageModel, attend_of: Callable[[Any], Any]) -> Callable[[Any, Any, Array], tuple[Array, Array]]:
    """Compiled `(setting, params, tokens[T]) -> (nats per token, density)`; `attend_of` gives one `attend` or one per layer."""

    @jax.jit
    def run(setting, params, tokens):
        logits, density = logits_and_density(lm.module, attend_of(setting), params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:]).mean(), density

    return run


def logits_and_density(
    module: Llama, attend: Any, params: Any, tokens: Int[Array, "T"]
) -> tuple[Float[Array, "T V"], Float[Array, ""]]:
    """(logits, share of values read over all layers and heads); params may hold compressed leaves."""
    call = lambda params, tokens: apply_attention(module, attend, {"params": params}, tokens)
    logits, records = compressed(call)(params, tokens[None])
    shares = [record.value_density.mean() for record in records if record is not None]
    return logits[0], jnp.stack(shares).mean() if shares else jnp.ones(())


def score(
    run: Callable[..., tuple[Array, Array]], setting: Any, params: Any, windows: Int[np.ndarray, "n T"]
) -> Scored:
    """Scores every window on its own."""
    results = [jax.device_get(run(setting, params, jnp.asarray(window))) for window in windows]
    return Scored([float(nats) for nats, _ in results], float(np.mean([share for _, share in results])))


def uniform(lm: LanguageModel, method: Method, windows: Int[np.ndarray, "n T"]) -> list[Scored]:
    """One threshold for all heads of all layers: one result per threshold."""
    run = scorer(lm, lambda threshold: method[0](threshold).attend)
    return [score(run, jnp.float32(threshold), lm.params, windows) for threshold in method[1]]


def per_head(
    lm: LanguageModel, method: Method, windows: Int[np.ndarray, "n T"], calibration: Array, targets: Sequence[float]
) -> list[Scored]:
    """A threshold per head from calibration windows: one result per target error."""
    config = lm.config
    run = scorer(lm, lambda levels: [method[0](level).attend for level in levels])
    tried = try_thresholds(*method, *captured(lm, calibration))
    out = []
    for target in targets:
        levels = tried.within(target).threshold.reshape(config.num_layers, config.num_heads)
        out.append(score(run, jnp.asarray(levels), lm.params, windows))
    return out


def captured(lm: LanguageModel, windows: Int[np.ndarray, "n T"]) -> tuple[Array, Array, Array]:
    """Queries, keys and values of all layers, their heads side by side: [n, T, layers * heads, d]."""
    keep = capture(dense_attention)
    attend = lambda query, key, value, mask, **options: keep(query, key, value, mask=mask)
    run = jax.jit(lambda params, tokens: apply_attention(lm.module, attend, {"params": params}, tokens)[1])
    return tuple(jnp.concatenate(parts, axis=2) for parts in zip(*run(lm.params, jnp.asarray(windows)), strict=True))


def ratios(scored: Scored, base: Scored, draws: int = 2000) -> list[float]:
    """[perplexity over that of dense attention, low, high]: a paired bootstrap over windows."""
    difference = np.array(scored.nats) - np.array(base.nats)
    picks = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    return np.exp([difference.mean(), min(low, difference.mean()), max(high, difference.mean())]).tolist()


def density_within(results: Sequence[Scored], base: Scored, ratio: float) -> float | None:
    """Density at which the perplexity comes within `ratio` of dense attention, straight lines over log density; None if never."""
    points = sorted((np.log(r.density), ratios(r, base, 1)[0]) for r in results)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 > ratio >= y1:
            return float(np.exp(x0 + (x1 - x0) * (y0 - ratio) / (y0 - y1)))
    return float(np.exp(points[0][0])) if points[0][1] <= ratio else None


def density_interval(results: Sequence[Scored], base: Scored, ratio: float, draws: int = 400) -> list[float] | None:
    """[`density_within`, low, high] by a bootstrap over windows; draws that never come within the ratio count as density 1."""
    value = density_within(results, base, ratio)
    if value is None:
        return None
    picks = np.random.default_rng(0).integers(len(base.nats), size=(draws, len(base.nats)))
    drawn = lambda scored, pick: Scored(np.array(scored.nats)[pick].tolist(), scored.density)
    found = [density_within([drawn(r, pick) for r in results], drawn(base, pick), ratio) or 1.0 for pick in picks]
    low, high = np.quantile(found, [0.025, 0.975])
    return [value, min(float(low), value), max(float(high), value)]


def weights(lm: LanguageModel, config: ConfigDict) -> dict[str, Any]:
    """{name: params}: dense, rounded to 4 bits, and by ABQ-LLM."""
    settings = dict(seed=0, context=config.context, calibration_windows=config.windows, evaluation_windows=1)
    settings = ConfigDict(settings | dict(batch_size=config.batch_size))
    text = experiment.load_text(lm, settings, experiment.read_texts("embedded"))
    data: Calibration = experiment.calibration(lm, settings, text)
    learned = abq(
        config.w_bits, config.a_bits, kv_bits=16, model=lm.module, epochs=config.epochs, batch_size=config.batch_size
    )
    name = f"ABQ-LLM W{config.w_bits}A{config.a_bits}"
    return {
        "FP32": lm.params,
        "RTN W4A16 g64": compress(rtn(bits=4, group_size=64), lm.params, None)[0],
        name: compress(learned, lm.params, data)[0],
    }


def composed(lm: LanguageModel, params: Any, attend: Any, kv_bits: int, windows: Int[np.ndarray, "n T"]) -> Scored:
    """One cell of the composition table: queries, keys and values rounded before they are ranked and gathered."""
    rounded = quantized_attention(kv_bits, attention_fn=attend)
    return score(scorer(lm, lambda _: rounded), None, params, windows)
