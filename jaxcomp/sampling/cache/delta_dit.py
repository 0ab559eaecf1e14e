"""Delta-DiT: a span of blocks is replaced by the deviation that it made last: rear blocks early in sampling, front blocks late.

Chen et al., arXiv 2406.01125.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxcomp.sampling.cache.uniform import every
from jaxcomp.sampling.denoiser import module_outputs
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Store, cached, either, planned


def deviations(span: int, boundary: int, blocks: str = r"blocks_\d+") -> Store:
    """Keeps Delta = F(h) - h of the first `span` blocks and of the last ones.

    A skipped step before step `boundary` replaces the rear span (outlines are made then), a later one the front span.

    Raises:
      ValueError: span outside of 1..number of blocks - 1 (when sampled).
    """

    def record(run, h, c):
        new, outputs = module_outputs(lambda around: run(h, c, around), blocks)
        names = list(outputs)
        if not 1 <= span < len(names):
            raise ValueError(f"span must lie in 1..{len(names) - 1} (the trunk has {len(names)} blocks), got {span}")
        change = lambda a, b: jax.tree.map(lambda u, v: u - v, a, b)
        front = change(outputs[names[span - 1]], h)
        rear = change(outputs[names[-1]], outputs[names[-span - 1]])
        return new, {"front": front, "rear": rear}, names

    def compute(kept, run, h, c, i):
        new, kept, _ = record(run, h, c)
        return new, kept

    def reuse(kept, run, h, c, i):
        names: list[str] = []
        jax.eval_shape(lambda: names.extend(record(run, h, c)[2]) or 0)

        def without(part: str, skipped: list[str]):
            def around(name, fn, h):
                if name == skipped[0]:
                    return jax.tree.map(lambda u, v: u + v, h, kept[part])
                return h if name in skipped else fn(h)

            return lambda: run(h, c, around)

        return either(i < boundary, without("rear", names[-span:]), without("front", names[:span])), kept

    return Store(lambda run, h, c: record(run, h, c)[1], compute, reuse)


def delta_dit(interval: int, span: int, boundary: int) -> CachePolicy:
    """All blocks at the steps 0, N, 2 N, ...; the others skip a span."""
    return cached(planned(lambda steps: every(steps, interval)), deviations(span, boundary))


@dataclasses.dataclass(frozen=True)
class DeltaDiTConfig:
    """Delta-DiT.

    Attributes:
      interval: N.
      span: blocks that a skipped step does not run.
      boundary: share of the steps in which the rear blocks are skipped, then the front blocks.
    """

    interval: int = 2
    span: int = 2
    boundary: float = 0.6

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        boundary = round(self.boundary * pipeline.solver.steps)
        return pipeline.replace(policy=delta_dit(self.interval, self.span, boundary))
