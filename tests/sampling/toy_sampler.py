"""A small network with named modules, and its sampler's arguments."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.denoiser import Denoiser

BLOCKS, WIDTH, CLASSES = 4, 16, 3


def init(key=0):
    """Params of `denoiser`."""
    keys = jax.random.split(jax.random.key(key), 2 * BLOCKS + 4)
    dense = lambda k, n, m: jax.random.normal(k, (n, m)) / np.sqrt(n)
    blocks = [
        {"attn": dense(keys[2 * i], WIDTH, WIDTH), "mlp": dense(keys[2 * i + 1], WIDTH, WIDTH)} for i in range(BLOCKS)
    ]
    embed = {"x": dense(keys[-1], 5, WIDTH), "t": dense(keys[-2], 2, WIDTH), "y": dense(keys[-3], CLASSES + 1, WIDTH)}
    return {"embed": embed, "blocks": blocks, "head": 0.5 * dense(keys[-4], WIDTH, 5)}


def _embed(params, x, t, cond):
    angles = t[:, None] * jnp.array([[0.001, 0.003]])
    c = jnp.tanh(jnp.sin(angles) @ params["embed"]["t"])
    c = c if cond is None else c + params["embed"]["y"][cond]
    return x @ params["embed"]["x"], c


def _trunk(params, h, c, around):
    for i, p in enumerate(params["blocks"]):

        def block(h, p=p, i=i):
            h = h + 0.4 * c * around(f"blocks_{i}/attn", lambda v: jnp.tanh(v @ p["attn"]), h + c)
            return h + 0.4 * around(f"blocks_{i}/mlp", lambda v: jnp.tanh(v @ p["mlp"]), h * c)

        h = around(f"blocks_{i}", block, h)
    return h


denoiser = Denoiser(_embed, _trunk, lambda params, h, c: h @ params["head"] + 0 * c[:, :1])


def flow(steps=8, shift=3.0):
    """Its solver."""
    return solvers.euler_flow(schedules.flow_grid(steps, shift))


def noise(batch=4, key=1):
    """Latents to start from."""
    return jax.random.normal(jax.random.key(key), (batch, 5))


LABELS = jnp.array([0, 1, 2, 0])
