"""Perplexity of a language model on fixed token windows."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import track


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Scores of a model on windows; token 0 of a window is context only, so `length - 1` tokens are predicted.

    `nll`: summed negative log likelihood of each window, nats. `correct`: right top-1 predictions of each window.
    """

    nll: Float[np.ndarray, "windows"]
    correct: Int[np.ndarray, "windows"]
    tokens_per_window: int

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return len(self.nll) * self.tokens_per_window

    @property
    def ppl(self) -> float:
        """exp of the mean negative log likelihood per predicted token; inf if that overflows."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll.sum() / self.tokens))

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model ranks first."""
        return float(self.correct.sum() / self.tokens)


def perplexity(
    apply: Callable[..., Float[Array, "batch length vocab"]],
    params,
    windows: Int[np.ndarray, "windows length"],
    batch_size: int = 16,
    *,
    mesh: Mesh | None = None,
) -> Perplexity:
    """Scores `apply(params, tokens) -> logits` on every window; log likelihoods in float32, their sums in float64.

    `params` may hold compressed leaves. With a `mesh` the batch is split over its axis `data`. The last batch is
    padded, so one shape is compiled; the same `apply` is compiled once for all calls.

    Raises:
      ValueError: no windows, windows of fewer than two tokens, or a batch that `data` does not divide.
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows: expected [n >= 1, length >= 2] tokens, found {windows.shape}")
    place = _placement(mesh, batch_size)
    nll, correct = [], []
    starts = range(0, len(windows), batch_size)
    console = Console(stderr=True)
    for start in track(starts, "perplexity", console=console, transient=True, disable=not console.is_terminal):
        batch = windows[start : start + batch_size]
        padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        token_nll, hit = jax.device_get(_score(apply, params, place(padded)))
        nll.append(token_nll[: len(batch)].astype(np.float64).sum(axis=1))
        correct.append(hit[: len(batch)].sum(axis=1))
    return Perplexity(np.concatenate(nll), np.concatenate(correct), windows.shape[1] - 1)


def _placement(mesh: Mesh | None, batch_size: int) -> Callable[[np.ndarray], Array]:
    if mesh is None:
        return jnp.asarray
    if "data" not in mesh.shape or batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of the mesh axis 'data'; the mesh is {dict(mesh.shape)}"
        )
    return functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    apply: Callable[..., Array], params, tokens: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length-1"], Bool[Array, "batch length-1"]]:
    logits, targets = apply(params, tokens)[:, :-1].astype(jnp.float32), tokens[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nll, jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
