"""Sparse attention for prefill: S2O and its baselines as `attention_fn`s."""

from jaxcomp.attention.calibrate import Calibrated, Tried, calibrate, try_thresholds
from jaxcomp.attention.layers import apply_attention, capture
from jaxcomp.attention.method import SparseAttention, dense_attention, planned
from jaxcomp.attention.plan import Plan
from jaxcomp.attention.s2o import default_threshold, s2o
from jaxcomp.attention.statistics import Statistics, certificate, visited_keys

__all__ = [
    "Calibrated",
    "Plan",
    "SparseAttention",
    "Statistics",
    "Tried",
    "apply_attention",
    "calibrate",
    "capture",
    "certificate",
    "default_threshold",
    "dense_attention",
    "planned",
    "s2o",
    "try_thresholds",
    "visited_keys",
]
