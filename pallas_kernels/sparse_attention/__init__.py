"""Attention over ranked keys with early stopping (after S2O, arXiv 2602.22575)."""

from pallas_kernels.sparse_attention.api import (
    BACKENDS,
    Choice,
    Stats,
    choose,
    density,
    omitted_bound,
    sparse_attention,
)
from pallas_kernels.sparse_attention.rank import key_order, prefix_blocks, query_order

__all__ = [
    "BACKENDS",
    "Choice",
    "Stats",
    "choose",
    "density",
    "key_order",
    "omitted_bound",
    "prefix_blocks",
    "query_order",
    "sparse_attention",
]
