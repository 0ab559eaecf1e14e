"""OmniQuant: ABQ-LLM's ancestor, learned clipping and learned rescaling against one squared error."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform
from jaxcomp.models import Llama
from jaxcomp.quantize.abq import abq
from jaxcomp.quantize.learned import BLOCKS
from jaxcomp.quantize.losses import Objective
from jaxcomp.quantize.student import RATES, Rates


def omniquant(
    w_bits: int = 4,
    a_bits: int = 4,
    *,
    model: Llama,
    rescale: bool | None = None,
    aug_loss: bool = False,
    rules: Sequence[Rule] = BLOCKS,
    epochs: int | None = None,
    rates: Rates = RATES,
    checkpoint_dir: str | pathlib.Path | None = None,
    **options: Any,
) -> Transform:
    """OmniQuant (Shao et al., ICLR 2024, arXiv 2308.13137): `abq` with fewer ingredients.

    Learned are clipping and the rescalings qkv, fc1, out and qkt (tied over rotated pairs), not fc2; the loss is MSE(F_q(X_q),
    F_fp(X_fp)). There is no compensation and no bit balance.

    Args:
      w_bits: weight bits, 1..8.
      a_bits: activation bits, per token; 16 for weights only.
      model: the decoder; only its config is read.
      rescale: learn rescalings; None is the authors' choice for Llama, only where activations are quantized.
      aug_loss: add MSE(F_q(X_q), F_fp(X_q)).
      rules: kernels of blocks, with options per leaf.
      epochs: per block; None is 20, or 40 up to 2 bits.
      rates: learning rates.
      checkpoint_dir: to continue after a kill.
      **options: `kv_bits`, `batch_size`, `alpha`, `clip_init` of `abq`, and fields of `jaxcomp.quantize.scheme.Scheme`.
    """
    rescale = a_bits < 16 if rescale is None else rescale
    return abq(
        w_bits,
        a_bits,
        model=model,
        rules=rules,
        epochs=epochs,
        rates=rates,
        objective=squared_errors(aug_loss),
        transforms=("qkv", "fc1", "out", "qkt") if rescale else (),
        compensate=(0, 0),
        checkpoint_dir=checkpoint_dir,
        **options,
    )


def squared_errors(aug_loss: bool) -> Objective:
    """MSE against the float stream, and with `aug_loss` against the float block on the rounded stream."""
    return Objective(mse_aug=float(aug_loss), cosine=0.0, cosine_aug=0.0, kl=0.0, kl_reverse=0.0)
