"""Pyramid attention broadcast: attention outputs are used again for a number of steps that depends on the kind of attention.

Zhao et al., ICLR 2025, arXiv 2408.12588. Every step runs its MLPs, so `Trace.nfe` stays the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool

from jaxcomp.sampling.denoiser import module_outputs
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Store, at_step, cached, either, matches, planned


def due(timesteps: np.ndarray, interval: int, inside: tuple[float, float]) -> Bool[np.ndarray, "T"]:
    """Steps at which a module computes: multiples of the interval, and all outside of the range of timesteps.

    Raises:
      ValueError: interval < 1.
    """
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    timesteps = np.asarray(timesteps)
    active = (timesteps > inside[0]) & (timesteps < inside[1])
    table = ~active | (np.arange(len(timesteps)) % interval == 0)
    table[0] = True
    return table


def broadcast(tables: Mapping[str, Bool[np.ndarray, "T"]]) -> Store:
    """Keeps the outputs of modules, each recomputed at the steps of the first of the tables whose pattern matches its name."""
    pattern = "|".join(f"({p})" for p in tables)

    def compute(kept, run, h, c, i):
        new = {}

        def around(name, fn, v):
            table = next((t for p, t in tables.items() if matches(p, name)), None)
            if table is None:
                return fn(v)
            new[name] = either(at_step(table, i), fn, lambda v: kept[name], v)
            return new[name]

        return run(h, c, around), new

    return Store(lambda run, h, c: module_outputs(lambda around: run(h, c, around), pattern)[1], compute, compute)


def pab(tables: Mapping[str, Bool[np.ndarray, "T"]]) -> CachePolicy:
    """The policy, from `due` tables by pattern of module names."""
    return cached(planned(lambda steps: np.ones(steps, bool)), broadcast(tables))


@dataclasses.dataclass(frozen=True)
class PyramidAttentionBroadcastConfig:
    """Pyramid attention broadcast.

    Attributes:
      intervals: (pattern of module names, interval), first match counts.
      timestep_skip_range: (low, high) of the network's time, inside of which outputs are broadcast.
    """

    intervals: tuple[tuple[str, int], ...] = ((r"blocks_\d+/attn", 2), (r"blocks_\d+/cross(_attn)?", 6))
    timestep_skip_range: tuple[float, float] = (100.0, 800.0)

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this cache."""
        tables = {p: due(pipeline.solver.t, n, self.timestep_skip_range) for p, n in self.intervals}
        return pipeline.replace(policy=pab(tables))
