"""Published sparse-attention methods and oracles, all `jaxcomp.attention.SparseAttention`s with one density accounting."""

from jaxcomp.attention.baselines.anchor import anchor
from jaxcomp.attention.baselines.blasst import blasst
from jaxcomp.attention.baselines.dense import dense
from jaxcomp.attention.baselines.flex_prefill import flex_prefill
from jaxcomp.attention.baselines.mean_pool import mean_pool
from jaxcomp.attention.baselines.minference import Pattern, minference
from jaxcomp.attention.baselines.oracle import oracle_blocks, oracle_order
from jaxcomp.attention.baselines.pbs import pbs
from jaxcomp.attention.baselines.sparge import sparge
from jaxcomp.attention.baselines.xattention import xattention

__all__ = [
    "Pattern",
    "anchor",
    "blasst",
    "dense",
    "flex_prefill",
    "mean_pool",
    "minference",
    "oracle_blocks",
    "oracle_order",
    "pbs",
    "sparge",
    "xattention",
]
