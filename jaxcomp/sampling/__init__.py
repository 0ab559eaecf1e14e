"""Diffusion samplers with state: solver, denoiser, cache policy and corrector around one explicit carry.

solver = solvers.euler_flow(schedules.flow_grid(30, shift=3.0))
x0, trace = jax.jit(lambda p, x, y: sample(denoiser, p, x, y, solver, policy=policy))(params, noise, labels)
"""

from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.denoiser import Denoiser, at_output, guided, recut, whole
from jaxcomp.sampling.explain import SamplerProgram, explain_sampler
from jaxcomp.sampling.loop import Carry, Trace, sample
from jaxcomp.sampling.network import network
from jaxcomp.sampling.pipeline import Pipeline, freeze_plan, with_cache
from jaxcomp.sampling.policy import CachePolicy, Decision, Store, cached, frozen, planned
from jaxcomp.sampling.solvers import LinearSolver

__all__ = [
    "CachePolicy",
    "Carry",
    "Corrector",
    "Decision",
    "Denoiser",
    "LinearSolver",
    "Pipeline",
    "SamplerProgram",
    "Store",
    "Trace",
    "at_output",
    "cached",
    "explain_sampler",
    "freeze_plan",
    "frozen",
    "guided",
    "network",
    "planned",
    "recut",
    "sample",
    "schedules",
    "solvers",
    "whole",
    "with_cache",
]
