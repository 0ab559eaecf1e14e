"""Round to nearest: the baseline of every quantizer, and the only one that needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcomp.core.leaf import replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform, stateless
from jaxcomp.quantize.scheme import KERNELS, targets


def rtn(bits: int = 4, *, rules: Sequence[Rule] = KERNELS, **scheme: Any) -> Transform:
    """Rounds weights to the nearest point of their min-max grid.

    Symmetric: s = max|w| / (2^(b-1) - 1), q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1). Asymmetric: see `jaxcomp.formats.grid`.

    Args:
      bits: weight bits, 1..8.
      rules: which leaves, and options per leaf.
      **scheme: further fields of `jaxcomp.quantize.scheme.Scheme`.
    """

    def update(params, stats):
        chosen = targets(params, rules, {"bits": bits, **scheme}, stats)
        return replace_leaves(params, {t.path: t.rounded() for t in chosen})

    return stateless(update)
