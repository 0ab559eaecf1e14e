"""FORA: outputs of attention and MLP are kept before their gates and used again until the next multiple of N.

Selvaraju et al., arXiv 2407.01425.
"""

from __future__ import annotations

import dataclasses

from jaxcomp.sampling.cache.uniform import every
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, cached, modules, planned

MODULES = r"blocks_\d+/(attn|cross|cross_attn|mlp)"


def fora(interval: int, pattern: str = MODULES) -> CachePolicy:
    """Computes at the steps 0, N, 2 N, ...; between them gates and modulation stay those of the current step."""
    return cached(planned(lambda steps: every(steps, interval)), modules(pattern))


@dataclasses.dataclass(frozen=True)
class FORAConfig:
    """FORA.

    Attributes:
      interval: N.
      pattern: names of the modules to keep.
    """

    interval: int = 3
    pattern: str = MODULES

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        return pipeline.replace(policy=fora(self.interval, self.pattern))
