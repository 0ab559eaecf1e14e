"""Sparsity: group masks."""

from jaxcomp.sparsify.magnitude import keep_largest, magnitude

__all__ = ["keep_largest", "magnitude"]
