"""A video model small enough for tests, with parameters that are not the closed gates of its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.models.video_dit import VideoDiT, VideoDiTConfig
from jaxcomp.sampling.autoregressive import video_denoiser
from jaxcomp.sampling.schedules import flow_grid
from jaxcomp.sampling.solvers import euler_flow

CONFIG = VideoDiTConfig(frames=2, size=8, patch=4, channels=2, width=16, depth=2, heads=2)
MODEL, STEPS, CHUNKS, BATCH = VideoDiT(CONFIG), 6, 2, 2
DENOISER = video_denoiser(MODEL)
LEVELS = flow_grid(STEPS, 2.0, time_scale=1.0)
SOLVER = euler_flow(LEVELS)


def _params():
    x = jnp.zeros((1, 1, CONFIG.chunk_tokens, CONFIG.token_channels))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x, jnp.ones((1, 1)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


PARAMS = _params()
NOISE = jax.random.normal(jax.random.key(1), (BATCH, CHUNKS, CONFIG.chunk_tokens, CONFIG.token_channels))
