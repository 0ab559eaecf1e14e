"""What experiments on language models share: the model, its text as windows, its score."""

import dataclasses
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from jaxcomp.core.apply import compressed
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.mesh import placement, replicate_outputs, shard_batch, shard_params
from jaxcomp.data import embedded_model, embedded_text, read_text, token_windows, wikitext2
from jaxcomp.evaluate import Perplexity, perplexity
from jaxcomp.io import huggingface
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.models.outliers import inject_outliers


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A dense model and how it is run.

    Attributes:
      config: its architecture.
      params: dense params.
      tokenizer: its tokenizer.
      module: the Linen module.
      apply: `(params, tokens) -> logits` of the plain model.
      run: the same for trees with compressed leaves; every process gets all logits.
      mesh: where it lives; None is the default device.
    """

    config: LlamaConfig
    params: Any
    tokenizer: tokenizers.Tokenizer
    module: Llama
    apply: Callable[[Any, Array], Array]
    run: Callable[[Any, Array], Array]
    mesh: Mesh | None


def load_model(folder: str | None, settings: ConfigDict, mesh: Mesh | None = None) -> LanguageModel:
    """Loads a Hugging Face folder, or the embedded model for None, and injects outliers if the settings ask for them.

    Raises:
      CheckpointError: a file is missing, damaged or of another architecture.
      ValueError: there are several processes and no mesh.
    """
    folder = model_folder(folder)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes need a mesh over all their devices; pass --mesh")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json and safetensors, found none; check --model"
        )
    where = None if mesh is None else lambda path, shape: placement(mesh)(path, "value", shape)
    config, params = huggingface.load_pretrained(folder, dtype=jnp.dtype(settings.dtype), sharding=where)
    if settings.outlier_channels:
        channels, factor = settings.outlier_channels, settings.outlier_factor
        params = inject_outliers(config, params, jax.random.key(settings.seed), channels=channels, factor=factor)
        params = params if mesh is None else shard_params(params, mesh)
    module = Llama(config, dtype=jnp.dtype(settings.dtype), param_dtype=jnp.dtype(settings.dtype))
    apply = lambda params, tokens: module.apply({"params": params}, tokens)
    run = compressed(apply) if jax.process_count() == 1 else replicate_outputs(compressed(apply), mesh)
    return LanguageModel(config, params, huggingface.load_tokenizer(folder), module, apply, run, mesh)


def model_folder(folder: str | None) -> pathlib.Path:
    """The folder of a model; None is the embedded one."""
    return embedded_model.FOLDER if folder is None else pathlib.Path(folder)


def fingerprint(folder: str | None) -> str:
    """Digest of the names, sizes and times of a model folder's files: another one means another model."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(model_folder(folder).glob("*"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def source_digest(function: Callable) -> str:
    """Digest of the source of a config's function: what it builds is part of a run's identity."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


class Text(NamedTuple):
    """Windows of tokens to calibrate on and to evaluate on."""

    calibration: Int32[np.ndarray, "n length"]
    evaluation: Int32[np.ndarray, "m length"]

    def digest(self) -> str:
        """Digest of both."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in self)).hexdigest()[:16]


def read_texts(text: str, calibration_text: str | None = None) -> tuple[str, str]:
    """(calibration text, evaluation text).

    Args:
      text: "embedded"; "wikitext2" (calibrates on its validation split, evaluates on its test split, from the folder that
        `JAXCOMP_DATA` names); or a UTF-8 file to evaluate on.
      calibration_text: a file to calibrate on instead; beside an evaluation file the default is the embedded text.

    Raises:
      FileNotFoundError, ValueError: a file is missing, empty or not UTF-8.
    """
    calibration = None if calibration_text is None else read_text(calibration_text)
    if text == "wikitext2":
        if "JAXCOMP_DATA" not in os.environ:
            raise FileNotFoundError("text 'wikitext2': set JAXCOMP_DATA to a folder that holds text/wikitext2_test.txt")
        data = os.environ["JAXCOMP_DATA"]
        return calibration or wikitext2(data, "valid"), wikitext2(data, "test")
    evaluation = embedded_text("validation") if text == "embedded" else read_text(text)
    return calibration or embedded_text("calibration"), evaluation


def load_text(lm: LanguageModel, settings: ConfigDict, texts: tuple[str, str]) -> Text:
    """Both texts as windows of `settings.context` tokens; those for calibration are drawn with `settings.seed`.

    Raises:
      ValueError: a text is too short, or the tokenizer is not that of the model.
    """
    length = min(settings.context, lm.config.max_len)
    calibration, evaluation = (
        _windows(lm, text, length, name) for name, text in zip(("calibration", "evaluation"), texts, strict=True)
    )
    order = np.random.default_rng(settings.seed).permutation(len(calibration))
    count = min(settings.calibration_windows, len(calibration))
    count -= count % min(settings.batch_size, count)  # batches of one shape
    return Text(calibration[order[:count]], _spread(evaluation, settings.evaluation_windows))


def _spread(windows: Int32[np.ndarray, "n length"], count: int) -> Int32[np.ndarray, "m length"]:
    """`count` windows at even distances; all of them for 0 or more than there are."""
    if not 0 < count < len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


def _windows(lm: LanguageModel, text: str, length: int, name: str) -> Int32[np.ndarray, "n length"]:
    ids = np.array(lm.tokenizer.encode(text).ids, np.int32)
    if ids.max(initial=0) >= lm.config.vocab_size:
        raise ValueError(
            f"tokenizer.json yields token {ids.max()}, but the model knows {lm.config.vocab_size}; fetch both from one model"
        )
    try:
        return token_windows(ids, length)
    except ValueError as error:
        raise ValueError(f"{name} text: {error}, or give a longer text") from None


def calibration(lm: LanguageModel, settings: ConfigDict, text: Text) -> Calibration:
    """The calibration windows in batches, on the mesh of the model."""
    batch = min(settings.batch_size, len(text.calibration))
    batches = text.calibration.reshape(-1, batch, text.calibration.shape[1])
    place = jnp.asarray if lm.mesh is None else lambda x: shard_batch(x, lm.mesh)
    return Calibration(lm.apply, map(place, batches))


def score(lm: LanguageModel, params: Any, settings: ConfigDict, text: Text) -> Perplexity:
    """Perplexity of the model with `params` on the evaluation windows.

    Raises:
      FloatingPointError: a window scored NaN or infinite.
    """
    splits = lm.mesh is not None and "data" in lm.mesh.shape and jax.process_count() == 1
    mesh = lm.mesh if splits else None  # several processes split over `model` alone: each must read all scores
    result = perplexity(lm.run, params, text.evaluation, settings.batch_size, mesh=mesh)
    if not np.isfinite(result.nll).all():
        bad = int((~np.isfinite(result.nll)).sum())
        raise FloatingPointError(f"{bad} of {len(result.nll)} windows score NaN or infinite; use more bits or groups")
    return result
