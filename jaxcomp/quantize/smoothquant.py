"""SmoothQuant: moves the difficulty of quantization from activations to weights, without changing the function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.transform import Transform, stateless
from jaxcomp.quantize.pairs import LLAMA, Pair, bind, measure, rescale
from jaxcomp.quantize.scheme import need_data


def smoothing_scale(
    max_abs: Float[Array, "*b k"], weights: Sequence[Float[Array, "*b n k"]], alpha: float
) -> Float[Array, "*b k"]:
    """s_j = max(max|X_j|^alpha / max|W_j|^(1 - alpha), 1e-5), the weight maximum (at least 1e-5) over all given weights."""
    w_max = jnp.max(jnp.stack([jnp.abs(w).max(-2) for w in weights]), axis=0)
    return jnp.maximum(max_abs**alpha / jnp.maximum(w_max, 1e-5) ** (1 - alpha), 1e-5)


def smoothquant(alpha: float = 0.5, *, pairs: Sequence[Pair] = LLAMA) -> Transform:
    """SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438, eq. 4): X W^T = (X / s)(W diag(s))^T.

    Rescales only; a quantizer follows: `chain(smoothquant(), rtn(bits=8, act_bits=8))`. The 1/s goes into the norm gain before q,
    k, v and before gate, up; like the authors' code, o and down are not smoothed.

    Args:
      alpha: 0 leaves all difficulty to the activations, 1 to the weights. The authors use 0.5 for OPT and 0.85 for Llama at W8A8.
      pairs: norms and the weights that read them; `GEMMA` for gains of 1 + scale, your own for other models.

    Raises:
      ValueError: no calibration data; alpha outside [0, 1]; the pairs do not fit the model (see `jaxcomp.quantize.pairs`).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")

    def update(params: Any, stats: Any) -> Any:
        need_data(stats, "smoothquant")
        places = bind(params, pairs, stats)
        measured = measure(stats, params, places, {"max_abs"})
        scales = [
            smoothing_scale(inputs["max_abs"], [t.matrix for t in place.consumers], alpha)
            for place, inputs in zip(places, measured, strict=True)
        ]
        return rescale(params, places, scales, stats)

    return stateless(update)
