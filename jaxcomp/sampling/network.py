"""A Linen model with the methods `embed`, `trunk` and `head` as a denoiser."""

import functools

import flax.linen as nn

from jaxcomp.sampling.denoiser import Denoiser


@functools.cache
def network(model: nn.Module) -> Denoiser:
    """The denoiser of a model such as `jaxcomp.models.dit.DiT`; one and the same object for equal models.

    For params with compressed leaves wrap the whole run: `jax.jit(compressed(lambda params, x: sample(network(model), params, x,
    cond, solver)))`; caches then see dense values only.
    """

    def part(method: str):
        return lambda params, *args: model.apply({"params": params}, *args, method=method)

    return Denoiser(part("embed"), part("trunk"), part("head"))
