"""Depth folding: blocks that share leaves."""

from jaxcomp.fold.plan import FoldPlan, contiguous_plan, fold, share_blocks, unfold

__all__ = ["FoldPlan", "contiguous_plan", "fold", "share_blocks", "unfold"]
