"""Runs a decoder with an attention of its own in every layer, and hands out what each of them has to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

_BLOCK = re.compile(r"blocks_(\d+)")
Attend = Callable[..., tuple[Any, Any]]  # (query, key, value, mask=..., ...) -> (output, record)


def apply_attention(
    model: nn.Module, attend: Attend | Sequence[Attend], variables: Any, *args: Any, **kwargs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """(`model.apply(variables, *args)`, the record of every layer) with `attend` as the attention of its blocks.

    Works under `jit` around the whole call. `attend` is say `SparseAttention.attend`, which records statistics, or `capture`; a
    sequence has one per block.

    Raises:
      ValueError: the blocks are not named "blocks_0", "blocks_1", ... (`scan_layers`), or their number is another.
    """
    records, layer = [], []

    def attention_fn(query, key, value, **options):
        if not layer:
            raise ValueError('attention outside of "blocks_<i>"; unstack the layers (scan_layers=False)')
        out, record = _pick(attend, layer[-1])(query, key, value, **options)
        records.append(record)
        return out

    def enter(call, args, kwargs, context):
        found = _BLOCK.fullmatch(context.module.name or "")
        if found is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        layer.append(int(found[1]))
        try:
            return call(*args, **kwargs)
        finally:
            layer.pop()

    with nn.intercept_methods(enter):
        out = model.clone(attention_fn=attention_fn).apply(variables, *args, **kwargs)
    if isinstance(attend, Sequence) and len(records) != len(attend):
        raise ValueError(f"{len(attend)} attentions for {len(records)} layers; give one per layer")
    return out, tuple(records)


def _pick(attend: Attend | Sequence[Attend], layer: int) -> Attend:
    if not isinstance(attend, Sequence):
        return attend
    if layer >= len(attend):
        raise ValueError(f"{len(attend)} attentions, but there is a layer {layer}; give one per layer")
    return attend[layer]


def capture(attention_fn: Callable[..., Any]) -> Attend:
    """An `attend` that records (query, key, value) of its layer, after the positional embedding."""
    return lambda query, key, value, **options: (attention_fn(query, key, value, **options), (query, key, value))
