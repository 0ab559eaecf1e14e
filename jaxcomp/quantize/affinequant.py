"""AffineQuant: equivalent transformations by matrices, kept invertible by a gradual mask."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.quantize.abq import default_epochs, grids
from jaxcomp.quantize.learned import BLOCKS, learned
from jaxcomp.quantize.let import Rescaling, Stats, Tree, let_apply, truncate
from jaxcomp.quantize.omniquant import squared_errors
from jaxcomp.quantize.student import RATES, Rates, Recipe

_MARGIN = 0.99  # off-diagonal absolute row sums stay below this share of the diagonal


@dataclasses.dataclass(frozen=True)
class Affine:
    """X W^T = (X A^-1)(W A^T)^T (arXiv 2403.12544): vectors after norms, a matrix A per head between v and o, and for q and k.

    A full matrix before the rotary embedding changes the function; what commutes with it is a complex number per rotated pair,
    which is what q and k get (their tied vector where the model normalises them). Matrices after norms, the paper's weight-only
    variant, would need a further product in the model and are left out.

    Attributes:
      epochs: of the gradual mask.
      stability: weight of off-diagonal entries.
      alpha: of SmoothQuant's initial scales.
    """

    epochs: int
    stability: float = 0.1
    alpha: float = 0.5
    needs = ("max_abs",)

    def init(self, config: LlamaConfig, block: Tree, stats: Stats) -> dict[str, Any]:
        """Diagonal matrices: `Rescaling`'s vectors, and a clock in epochs that drives the mask."""
        let = Rescaling(("qkv", "fc1", "out", "qkt"), self.alpha).init(config, block, stats)["let"]
        let["out"] = jax.vmap(jnp.diag)(let["out"])
        if not config.traits.qk_norm:
            let["qkt"] = jnp.stack([let["qkt"], jnp.zeros_like(let["qkt"])], axis=1)
        return {"let": let, "clock": jnp.zeros(())}

    def apply(self, config: LlamaConfig, block: Tree, theta: Mapping[str, Any]) -> Tree:
        """The block with its matrices, as far as the mask lets them in, and its vectors."""
        let = dict(theta["let"])
        epoch = jax.lax.stop_gradient(jnp.floor(theta["clock"] + 0.01))
        mask = gradual_mask(config.head_dim, epoch, self.epochs, self.stability)
        flat = flatten_dict(block, sep="/")
        _between_v_and_o(config, flat, dominant(let.pop("out") * mask[None]))
        if not config.traits.qk_norm:
            half = config.head_dim // 2
            _on_query_and_key(config, flat, _dominant_pairs(let.pop("qkt"), mask[0, half]))
        return let_apply(config, unflatten_dict(flat, sep="/"), let)


def gradual_mask(size: int, epoch: Float[Array, ""], epochs: int, stability: float) -> Float[Array, "d d"]:
    """1 on the diagonal, `stability` where 0 < |i - j| < k, else 0, with k = floor((size - 1) / (epochs - 1) * epoch) + 1.

    All of the matrix is in by the last epoch.
    """
    epoch = jnp.minimum(epoch, max(epochs - 1, 0))
    reach = jnp.floor((size - 1) * epoch / max(epochs - 1, 1)) + 1
    distance = jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size)[None]).astype(jnp.float32)
    return jnp.where(distance == 0, 1.0, jnp.where(distance < reach, stability, 0.0))


def dominant(a: Float[Array, "K d d"]) -> Float[Array, "K d d"]:
    """Strictly diagonally dominant by rows, hence invertible: off-diagonal entries shrink where their sum is too large."""
    eye = jnp.eye(a.shape[-1], dtype=bool)[None]
    diagonal = truncate(jnp.diagonal(a, axis1=-2, axis2=-1))[..., None]
    off = jnp.where(eye, 0.0, a)
    total = jnp.abs(off).sum(-1, keepdims=True)
    shrink = jnp.minimum(1.0, _MARGIN * jnp.abs(diagonal) / jnp.maximum(total, 1e-12))
    return jnp.where(eye, diagonal, off * shrink)


def _dominant_pairs(c: Float[Array, "K 2 d/2"], weight: Float[Array, ""]) -> tuple[Array, Array]:
    """Real and imaginary parts of the numbers of rotated pairs, each the 2x2 matrix [[re, -im], [im, re]] made dominant."""
    real, imaginary = truncate(c[:, 0]), c[:, 1] * weight
    bound = _MARGIN * jnp.abs(real)
    return real, jnp.clip(imaginary, -bound, bound)


def _between_v_and_o(config: LlamaConfig, flat: Tree, a: Float[Array, "K d d"]) -> None:
    """v <- v A^-1 and the weights of o <- A W: per key-value head, for all its query heads."""
    inverse, heads, depth = jnp.linalg.inv(a), config.num_kv_heads, config.head_dim
    for name in ("kernel", "bias"):
        if (value := flat.get(f"attn/v/{name}")) is not None:
            turned = jnp.einsum("...ki,kij->...kj", value.reshape(*value.shape[:-1], heads, depth), inverse)
            flat[f"attn/v/{name}"] = turned.reshape(value.shape)
    kernel = flat["attn/o/kernel"]
    turned = jnp.einsum("kij,kgjd->kgid", a, kernel.reshape(heads, -1, depth, kernel.shape[-1]))
    flat["attn/o/kernel"] = turned.reshape(kernel.shape)


def _on_query_and_key(config: LlamaConfig, flat: Tree, c: tuple[Array, Array]) -> None:
    """k <- c k and q <- q / conj(c) for the complex numbers (x_i, x_(i + d/2)): products after the rotary embedding stay."""
    real, imaginary = c
    square = real**2 + imaginary**2
    for name, (re, im) in {"k": (real, imaginary), "q": (real / square, imaginary / square)}.items():
        for part in ("kernel", "bias"):
            if (value := flat.get(f"attn/{name}/{part}")) is not None:
                pairs = value.reshape(*value.shape[:-1], config.num_kv_heads, -1, 2, config.head_dim // 2)
                re_, im_ = (jnp.broadcast_to(x[:, None], pairs[..., 0, :].shape) for x in (re, im))
                x, y = pairs[..., 0, :], pairs[..., 1, :]
                flat[f"attn/{name}/{part}"] = jnp.stack([re_ * x - im_ * y, im_ * x + re_ * y], -2).reshape(value.shape)


def affinequant(
    w_bits: int = 4,
    a_bits: int = 4,
    *,
    model: Llama,
    kv_bits: int | None = None,
    stability: float | None = None,
    rules: Sequence[Rule] = BLOCKS,
    epochs: int | None = None,
    batch_size: int = 1,
    rates: Rates = RATES,
    alpha: float = 0.5,
    clip_init: float = 4.0,
    checkpoint_dir: str | pathlib.Path | None = None,
    **scheme: Any,
) -> Transform:
    """AffineQuant (Ma et al., ICLR 2024, arXiv 2403.12544): OmniQuant with matrices in place of some vectors; see `Affine`.

    The loss is the two squared errors. Matrices stay strictly diagonally dominant: by the gradual mask as in the paper, and
    where that is not enough by shrinking the off-diagonal entries.

    Args:
      w_bits: weight bits, 1..8.
      a_bits: activation bits, per token; 16 for weights only.
      model: the decoder; only its config is read.
      kv_bits: bits of queries, keys and values; None is `a_bits`.
      stability: weight of off-diagonal entries; None is the authors' 0.1, or 0.01 up to 2 bits.
      rules: kernels of blocks, with options per leaf.
      epochs: per block; None is 20, or 40 up to 2 bits.
      batch_size: sequences per step.
      rates: learning rates (the authors lower `let` to 1e-3 for Llama-2-7B at W4A4).
      alpha: of SmoothQuant's initial scales.
      clip_init: initial logits of clipping.
      checkpoint_dir: to continue after a kill.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`; grids are asymmetric by default.
    """
    epochs = default_epochs(w_bits) if epochs is None else epochs
    stability = (0.01 if w_bits <= 2 else 0.1) if stability is None else stability
    recipe = Recipe(
        name="affinequant",
        objective=squared_errors(aug_loss=True),
        equivalence=Affine(epochs, stability, alpha),
        kv_bits=a_bits if kv_bits is None else kv_bits,
        epochs=epochs,
        batch_size=batch_size,
        clip_init=clip_init,
        rates=rates,
    )
    return learned(recipe, model, rules, grids(w_bits, a_bits, scheme), checkpoint_dir)
