"""Sparsity: group masks, and whole filters."""

from jaxcomp.sparsify.filters import Space, remove_zero_filters, rlfn_spaces, soft_filter_pruning
from jaxcomp.sparsify.magnitude import keep_largest, magnitude

__all__ = ["Space", "keep_largest", "magnitude", "remove_zero_filters", "rlfn_spaces", "soft_filter_pruning"]
