"""The DiT: patches, identity at the start, per-token times, `around` under transformations, bad input."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.models.dit import DiT, init_params
from jaxcomp.models.dit_config import DiTConfig
from jaxcomp.models.patches import patchify, token_grid, unpatchify
from jaxcomp.models.positions import rope_angles, rotate_pairs, sincos_table, timestep_features
from jaxcomp.sampling import policy, schedules, solvers
from jaxcomp.sampling.denoiser import guided
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.network import network

CONFIG = DiTConfig((4, 6), 3, (2, 2), 16, 2, 2, 32, num_classes=5)
VIDEO = DiTConfig((2, 4, 4), 3, (1, 2, 2), 24, 1, 2, 32, text_size=7, position="rope", modulation="table", qk_norm=True)


def randomised(config, seed=0):
    """Params without adaLN's zeros."""
    rng = np.random.default_rng(seed + 1)
    change = lambda leaf: jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(change, jax.device_get(init_params(config, jax.random.key(seed))))


PARAMS = randomised(CONFIG)
X = jax.random.normal(jax.random.key(2), (2, 4, 6, 3))
T = jnp.array([10.0, 900.0])
LABELS = jnp.array([1, 4])


def run(*args, config=CONFIG, params=PARAMS, **options):
    return jax.jit(lambda params, args: DiT(config).apply({"params": params}, *args, **options))(params, args)


def test_patches_are_cut_in_row_order():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, (2, 3))
    np.testing.assert_array_equal(tokens[0, 1], x[0, :2, 3:].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, (2, 2), (2, 3)), x)
    video = jnp.arange(2 * 4 * 4 * 6 * 3).reshape(2, 4, 4, 6, 3)
    np.testing.assert_array_equal(unpatchify(patchify(video, (2, 2, 3)), (2, 2, 2), (2, 2, 3)), video)
    with pytest.raises(ValueError, match="not divisible"):
        token_grid((4, 6), (3, 2))


def test_blocks_start_as_the_identity_and_the_output_at_zero():
    params = init_params(CONFIG, jax.random.key(0))
    h, c = run(X, T, LABELS, params=params, method="embed")
    np.testing.assert_array_equal(run(h, c, params=params, method="trunk"), h)
    np.testing.assert_array_equal(run(X, T, LABELS, params=params), jnp.zeros_like(X))


def test_parts_compose_to_the_whole():
    h, c = run(X, T, LABELS, method="embed")
    out = run(run(h, c, method="trunk"), c, method="head")
    np.testing.assert_allclose(out, run(X, T, LABELS), atol=1e-6)


@pytest.mark.parametrize(("config", "cond"), [(CONFIG, LABELS), (VIDEO, jnp.ones((2, 3, 7)))], ids=["classes", "text"])
def test_one_time_per_token_equals_one_per_sample(config, cond):
    params = randomised(config)
    x = jax.random.normal(jax.random.key(3), (2, *config.size, 3))
    per_token = jnp.broadcast_to(T[:, None], (2, config.num_tokens))
    whole = run(x, T, cond, config=config, params=params)
    np.testing.assert_allclose(run(x, per_token, cond, config=config, params=params), whole, atol=1e-5)
    changed = run(x, per_token.at[:, 0].set(500.0), cond, config=config, params=params)
    assert float(jnp.abs(changed - whole).max()) > 1e-3


def test_no_label_is_the_last_class():
    np.testing.assert_array_equal(run(X, T), run(X, T, jnp.full(2, 5)))
    assert float(jnp.abs(run(X, T) - run(X, T, LABELS)).max()) > 1e-3


def test_around_sees_every_module_and_may_branch():
    names = []

    def around(name, fn, x):
        names.append(name)
        return jax.lax.cond(jnp.sum(x) > -1e9, fn, jnp.zeros_like, x)

    found = run(X, T, LABELS, around=around)
    assert names == [f"blocks_{i}{part}" for i in range(2) for part in ("", "/attn", "/mlp")]
    np.testing.assert_allclose(found, run(X, T, LABELS), atol=1e-6)


def test_around_can_replace_a_module():
    skip = lambda name, fn, x: x if name in ("blocks_0", "blocks_1") else fn(x)
    h, c = run(X, T, LABELS, method="embed")
    np.testing.assert_array_equal(run(h, c, around=skip, method="trunk"), h)


def test_learned_variances_are_left_out_of_the_prediction():
    config = dataclasses.replace(CONFIG, out_channels=6)
    params = randomised(config)
    h, c = run(X, T, LABELS, config=config, params=params, method="embed")
    whole = run(h, c, variance=True, config=config, params=params, method="head")
    np.testing.assert_array_equal(run(h, c, config=config, params=params, method="head"), whole[..., :3])


def test_sampler_runs_it_with_guidance_and_a_cache():
    solver = solvers.euler_flow(schedules.flow_grid(4))
    denoiser = guided(network(DiT(CONFIG)), 1.5, jnp.int32(5))
    draw = lambda chosen: jax.jit(lambda p, x: sample(denoiser, p, x, LABELS, solver, policy=chosen)[0])(PARAMS, X)
    half = policy.cached(policy.planned(np.array([True, False, True, False])), policy.residual())
    assert 0 < float(jnp.abs(draw(half) - draw(None)).mean()) < float(jnp.abs(draw(None)).mean())
    every = policy.cached(policy.planned(np.ones(4, bool)), policy.modules(r"blocks_\d+/attn"))
    np.testing.assert_allclose(draw(every), draw(None), atol=1e-6)


def test_attention_fn_is_the_users():
    seen = []

    def attention(query, key, value):
        seen.append(query.shape)
        return nn.dot_product_attention(query, key, value)

    found = jax.jit(DiT(CONFIG, attention).apply)({"params": PARAMS}, X, T, LABELS)
    np.testing.assert_allclose(found, run(X, T, LABELS), atol=1e-5)
    assert seen == [(2, 6, 2, 8)] * 2


def test_positions():
    table = sincos_table((2, 3), 8)
    np.testing.assert_allclose(
        table[4], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)] * 2, rtol=1e-6
    )  # row 1, column 1
    assert table.shape == (6, 8)
    angles = rope_angles((2, 2, 2), 12)
    assert angles.shape == (8, 6)
    np.testing.assert_allclose(angles[1], [0, 0, 0, 0, 1, 0.01], atol=1e-7)
    x = jax.random.normal(jax.random.key(4), (1, 8, 2, 12))
    turned = rotate_pairs(x, jnp.asarray(angles)[None])
    np.testing.assert_allclose(jnp.square(turned).sum(-1), jnp.square(x).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-6)
    features = timestep_features(jnp.array([0.0, 2.0]), 8)
    np.testing.assert_allclose(features[0], [1, 1, 1, 1, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(features[1, 4], np.sin(2), rtol=1e-5)
    for bad in (lambda: sincos_table((2, 3), 6), lambda: rope_angles((2, 2, 2), 4)):
        with pytest.raises(ValueError, match="needs"):
            bad()


def test_bad_input_is_refused():
    cases = [
        ((X[:, :2], T, LABELS), "x: expected"),
        ((X, T[:1], LABELS), "t: expected"),
        ((X, T, LABELS[:1]), "cond: expected"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*args)
    with pytest.raises(ValueError, match="encode the prompt"):
        run(jnp.zeros((2, 2, 4, 4, 3)), T, config=VIDEO, params=randomised(VIDEO))
    for change in ({"position": "learned"}, {"num_heads": 3}, {"patch": (3, 2)}, {"text_size": 4}, {"hidden_size": 18}):
        with pytest.raises(ValueError):
            dataclasses.replace(CONFIG, **change)
