"""What caches are calibrated from: full runs that record something about every trunk, without keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sampling.loop import integrate
from jaxcomp.sampling.pipeline import Pipeline
from jaxcomp.sampling.policy import CachePolicy, Run


def recorder(init: Callable[[Any, Any], Any], observe: Callable[[Any, Any, Any, Any, Any], Any]) -> CachePolicy:
    """Computes every step; its state is `memory = observe(memory, h, c, h', i)`, shaped as `init(h, c)` and zero at first."""

    def compute(memory: Any, run: Run, h: Any, c: Any, i: Any) -> tuple[Any, Any]:
        new = run(h, c)
        return new, observe(memory, h, c, new, i)

    def reuse(memory, run, h, c, i):
        raise ValueError("a recorder computes every step; freeze the mask of another policy")

    plan = lambda steps: np.ones(steps, bool)
    return CachePolicy(
        plan, lambda run, h, c: init(h, c), lambda memory, h, c, i: (jnp.array(True), memory), compute, reuse
    )


def record(
    pipeline: Pipeline, policy: CachePolicy, params: Any, x: Float[Array, "B ..."], cond: Any = None, key: Any = None
) -> Any:
    """The recorder's memory after a run of the pipeline without its own cache, compiled as one scan."""

    def run(params, x, cond, key):
        options = dict(policy=policy, key=key, executor="cond")
        return integrate(pipeline.denoiser, params, x, cond, pipeline.solver, **options)[0].cache

    return jax.jit(run)(params, x, cond, key)


def mean_abs(tree: Any) -> Float[Array, ""]:
    """Mean magnitude over all elements of a tree, float32."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.abs(v).sum(dtype=jnp.float32) for v in leaves)
    return total / sum(v.size for v in leaves)


def relative_l1(new: Any, old: Any) -> Float[Array, ""]:
    """mean |new - old| / mean |old|, over the whole batch; 0 where old is 0."""
    size = mean_abs(old)
    return jnp.where(size > 0, mean_abs(jax.tree.map(jnp.subtract, new, old)) / jnp.maximum(size, 1e-30), 0.0)
