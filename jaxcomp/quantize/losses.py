"""Losses of block-wise calibration: how far a quantized block is from the float block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the six terms of ABQ-LLM's loss (arXiv 2408.08554; a term of weight 0 is not computed).

    With Y_q the block's output from quantized inputs, Y_fp the float block's from float inputs, Y*_fp the float block's from
    quantized inputs, and A the attention probabilities averaged over heads (A_fp from float inputs):

    Attributes:
      mse: of MSE(Y_q, Y_fp), OmniQuant's loss.
      mse_aug: of MSE(Y_q, Y*_fp), OmniQuant's `aug_loss`.
      cosine: of -log |mean cos(Y_q, Y_fp)| ("DLC" with the next).
      cosine_aug: of -log |mean cos(Y_q, Y*_fp)|.
      kl: of KL(A_q || A_fp) ("AKL" with the next).
      kl_reverse: of KL(A_fp || A_q).
      double_softmax: the divergences as the authors' code has them: softmax of probabilities, mean over all entries. With long
        windows that term all but vanishes; the default is the divergence itself.
    """

    mse: float = 1.0
    mse_aug: float = 1.0
    cosine: float = 1.0
    cosine_aug: float = 1.0
    kl: float = 1.0
    kl_reverse: float = 1.0
    double_softmax: bool = False

    def __post_init__(self):
        weights = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "double_softmax"]
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights must not be negative, and one must be positive; found {self}")

    @property
    def needs_aug(self) -> bool:
        """True if Y*_fp enters."""
        return self.mse_aug > 0 or self.cosine_aug > 0

    @property
    def needs_attention(self) -> bool:
        """True if attention probabilities enter."""
        return self.kl > 0 or self.kl_reverse > 0

    def __call__(
        self,
        y: Float[Array, "B T D"],
        y_fp: Float[Array, "B T D"],
        y_aug: Float[Array, "B T D"] | None,
        attention: Float[Array, "B T S"] | None,
        attention_fp: Float[Array, "B T S"] | None,
    ) -> Float[Array, ""]:
        """The weighted sum."""
        divergence = softmax_divergence if self.double_softmax else attention_divergence
        terms = (
            (self.mse, lambda: squared_error(y, y_fp)),
            (self.mse_aug, lambda: squared_error(y, y_aug)),
            (self.cosine, lambda: log_cosine(y, y_fp)),
            (self.cosine_aug, lambda: log_cosine(y, y_aug)),
            (self.kl, lambda: divergence(attention, attention_fp)),
            (self.kl_reverse, lambda: divergence(attention_fp, attention)),
        )
        return sum(weight * term() for weight, term in terms if weight)


ALL_TERMS = Objective()


def squared_error(y: Float[Array, "B T D"], target: Float[Array, "B T D"]) -> Float[Array, ""]:
    """Mean of (y - target)^2 over all entries."""
    return jnp.mean((y - target) ** 2)


def log_cosine(y: Float[Array, "B T D"], target: Float[Array, "B T D"]) -> Float[Array, ""]:
    """-log |mean over tokens of cos(y, target)|, the cosine over the last axis."""
    norms = jnp.linalg.norm(y, axis=-1) * jnp.linalg.norm(target, axis=-1)
    cosine = jnp.sum(y * target, axis=-1) / jnp.maximum(norms, 1e-8)
    return -jnp.log(jnp.abs(jnp.mean(cosine)))


def attention_divergence(p: Float[Array, "B T S"], q: Float[Array, "B T S"]) -> Float[Array, ""]:
    """KL(p || q) = sum over keys of p log((p + 1e-8) / (q + 1e-8)), mean over rows. Keys that both do not see add nothing."""
    return jnp.mean(jnp.sum(p * (jnp.log(p + 1e-8) - jnp.log(q + 1e-8)), axis=-1))


def softmax_divergence(p: Float[Array, "B T S"], q: Float[Array, "B T S"]) -> Float[Array, ""]:
    """KL(softmax p || softmax q) averaged over all B T S entries, as in the authors' code."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.mean(jnp.exp(log_p) * (log_p - log_q))
