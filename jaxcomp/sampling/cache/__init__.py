"""Cache policies, one file each: which steps of a sampler skip the trunk, and what stands in for it.

from jaxcomp.sampling import Pipeline, with_cache
from jaxcomp.sampling.cache import TaylorSeerCacheConfig

fast = with_cache(Pipeline(denoiser, solver), TaylorSeerCacheConfig(cache_interval=3))

A config is a frozen dataclass of one method's settings. What it has to know of a model comes from `calibrate` or `calibrated` of
its file, thresholds for a number of steps from `search.tune`, plans for a budget of quality or steps from `pareto`. FlowCache and
MotionCache act on chunks and tokens of `jaxcomp.sampling.autoregressive`.
"""

from jaxcomp.sampling.cache.adacache import AdaCacheConfig
from jaxcomp.sampling.cache.dbcache import DBCacheConfig, first_block_cache
from jaxcomp.sampling.cache.deepcache import DeepCacheConfig
from jaxcomp.sampling.cache.delta_dit import DeltaDiTConfig
from jaxcomp.sampling.cache.ertacache import ERTACacheConfig
from jaxcomp.sampling.cache.fastercache import FasterCacheConfig, FasterGuidanceConfig
from jaxcomp.sampling.cache.fora import FORAConfig
from jaxcomp.sampling.cache.magcache import MagCacheConfig
from jaxcomp.sampling.cache.motioncache import MotionCacheConfig
from jaxcomp.sampling.cache.pab import PyramidAttentionBroadcastConfig
from jaxcomp.sampling.cache.sencache import SenCacheConfig
from jaxcomp.sampling.cache.taylorseer import TaylorSeerCacheConfig
from jaxcomp.sampling.cache.teacache import TeaCacheConfig
from jaxcomp.sampling.cache.uniform import UniformCacheConfig

__all__ = [
    "AdaCacheConfig",
    "DBCacheConfig",
    "DeepCacheConfig",
    "DeltaDiTConfig",
    "ERTACacheConfig",
    "FORAConfig",
    "FasterCacheConfig",
    "FasterGuidanceConfig",
    "MagCacheConfig",
    "MotionCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "SenCacheConfig",
    "TaylorSeerCacheConfig",
    "TeaCacheConfig",
    "UniformCacheConfig",
    "first_block_cache",
]
