"""A two-block gated network in plain JAX with the names of a Llama tree, all kernels of one shape so that little is compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxcomp.core.calibrate import Calibration

DIM, TOKENS = 16, 96


def block(params, x):
    """Norm, gated mixing, norm, gated MLP; `v` and `up` enter linearly, as in attention and MLP."""
    norm = lambda p, x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"][None]
    y = norm(params["attn_norm"], x)
    q, k, v = (y @ params["attn"][name]["kernel"] for name in ("q", "k", "v"))
    x = x + (jnp.tanh(q * k) * v) @ params["attn"]["o"]["kernel"]
    y = norm(params["mlp_norm"], x)
    hidden = jax.nn.silu(y @ params["mlp"]["gate"]["kernel"]) * (y @ params["mlp"]["up"]["kernel"])
    return x + hidden @ params["mlp"]["down"]["kernel"]


def unrolled(params, x):
    """`blocks_0`, `blocks_1`, then `head`."""
    for name in ("blocks_0", "blocks_1"):
        x = block(params[name], x)
    return x @ params["head"]["kernel"]


def scanned(params, x):
    """The same over `blocks` with a leading layer axis."""
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])
    return x @ params["head"]["kernel"]


def stack(params):
    """The tree of `scanned` from that of `unrolled`."""
    blocks = jax.tree.map(lambda *x: jnp.stack(x), params["blocks_0"], params["blocks_1"])
    return {"blocks": blocks, "head": params["head"]}


def _block_params(key):
    keys = iter(jax.random.split(key, 9))
    kernels = lambda *names: {name: {"kernel": jax.random.normal(next(keys), (DIM, DIM)) / DIM**0.5} for name in names}
    params = {"attn": kernels("q", "k", "v", "o"), "mlp": kernels("gate", "up", "down")}
    gain = lambda: {"scale": jnp.exp(0.8 * jax.random.normal(next(keys), (DIM,)))}  # a few channels stick out
    return params | {"attn_norm": gain(), "mlp_norm": gain()}


@dataclasses.dataclass
class Toy:
    """A model, its params, one input and the calibration data."""

    apply: Callable
    params: Any
    x: jax.Array
    data: Calibration


@pytest.fixture(scope="session")
def toy() -> Toy:
    """The unrolled network."""
    keys = jax.random.split(jax.random.key(3), 5)
    params = {"blocks_0": _block_params(keys[0]), "blocks_1": _block_params(keys[1])}
    params["head"] = {"kernel": jax.random.normal(keys[2], (DIM, DIM)) / 4}
    mix = jax.random.normal(keys[3], (DIM, DIM)) / 4
    x = jax.random.normal(keys[4], (2, TOKENS, DIM)) @ mix  # correlated channels
    return Toy(unrolled, params, x[0], Calibration(unrolled, list(x)))


@pytest.fixture(scope="session")
def scanned_toy(toy) -> Toy:
    """The same network as a scan over stacked layers."""
    return Toy(scanned, stack(toy.params), toy.x, Calibration(scanned, toy.data.batches))
