"""ABQ-LLM: weights and activations of any number of bits, learned block by block."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform
from jaxcomp.models import Llama
from jaxcomp.quantize.learned import BLOCKS, learned
from jaxcomp.quantize.let import NAMES, Rescaling
from jaxcomp.quantize.losses import ALL_TERMS, Objective
from jaxcomp.quantize.student import RATES, Rates, Recipe


def abq(
    w_bits: int = 2,
    a_bits: int = 8,
    *,
    model: Llama,
    kv_bits: int | None = None,
    bit_balance: bool = False,
    rules: Sequence[Rule] = BLOCKS,
    epochs: int | None = None,
    batch_size: int = 1,
    rates: Rates = RATES,
    objective: Objective = ALL_TERMS,
    transforms: tuple[str, ...] = NAMES,
    alpha: float = 0.5,
    tie_rotary: bool = True,
    shift: bool = False,
    compensate: tuple[int, int] = (3, 4),
    clip_init: float = 4.0,
    learn_rounding: bool = False,
    checkpoint_dir: str | pathlib.Path | None = None,
    **scheme: Any,
) -> Transform:
    """ABQ-LLM (Zeng et al., AAAI 2025, arXiv 2408.08554) for the decoders of `jaxcomp.models.llama`.

    Per block, AdamW learns the clipping of weights, five rescalings and a rank-one compensation of the first and last down
    projections, against two squared errors, two cosine terms and the divergence of attention maps. Embeddings, norms and head
    stay in floating point. Where kv_bits < 16 run the result with `Llama(config, attention_fn=quantized_attention(kv_bits))`.

    Departures from the authors' code: min <= 0 <= max in every grid, so that zero is a code; the divergence is that of attention
    itself (`Objective.double_softmax` for theirs); qkt scales are tied over rotated pairs; plain 2-bit grids are possible.

    Args:
      w_bits: weight bits, 1..8.
      a_bits: activation bits, per token; 16 for weights only.
      model: the decoder; only its config is read.
      kv_bits: bits of queries, keys and values; None is `a_bits`.
      bit_balance: the paper's W2*: 2^b + 1 levels for 1 and 2 bits, of activations too. Five levels are stored in 3 bits.
      rules: kernels of blocks, with options per leaf.
      epochs: per block; None is the authors' 20, or 40 up to 2 bits.
      batch_size: sequences per step.
      rates: learning rates.
      objective: weights of the six losses.
      transforms: of "qkv", "fc1", "out", "fc2", "qkt".
      alpha: of SmoothQuant's initial scales.
      tie_rotary: False for the authors' untied qkt, which changes the function.
      shift: also learn shifts between v and o.
      compensate: how many blocks at the beginning and the end are compensated (fewer in small models, see `compensated_blocks`).
      clip_init: initial logits of clipping.
      learn_rounding: also learn which way every weight rounds, against the same losses; not in the paper (AutoRound's offsets,
        Cheng et al., arXiv 2309.05516, by AdamW). All weights of a block are then trained, with AdamW's two moments.
      checkpoint_dir: to continue after a kill.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`; grids are asymmetric by default.

    Raises:
      ValueError: see `jaxcomp.quantize.learned.learned`; an option is out of range.
    """
    recipe = Recipe(
        name="abq",
        objective=objective,
        equivalence=Rescaling(tuple(transforms), alpha, tie_rotary, shift) if transforms or shift else None,
        kv_bits=a_bits if kv_bits is None else kv_bits,
        epochs=default_epochs(w_bits) if epochs is None else epochs,
        batch_size=batch_size,
        compensate=tuple(compensate),
        bit_balance=bit_balance,
        clip_init=clip_init,
        rounding=learn_rounding,
        rates=rates,
    )
    return learned(recipe, model, rules, grids(w_bits, a_bits, scheme), checkpoint_dir)


def default_epochs(w_bits: int) -> int:
    """The authors' epochs per block."""
    return 40 if w_bits <= 2 else 20


def grids(w_bits: int, a_bits: int, scheme: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Scheme`: asymmetric grids unless `scheme` says otherwise."""
    return {"bits": w_bits, "act_bits": a_bits, "symmetric": False, "act_symmetric": False, **scheme}
