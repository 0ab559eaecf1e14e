"""The six loss terms against independent NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quantize.losses import Objective, attention_divergence, softmax_divergence

NAMES = ("mse", "mse_aug", "cosine", "cosine_aug", "kl", "kl_reverse")
OFF = dict.fromkeys(NAMES, 0.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def case():
    """(y, y_fp, y_aug, attention, attention_fp) in float64; attention is causal."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 2, 5, 8))
    y[1:] = y[0] + 0.3 * y[1:]
    scores = np.where(np.tril(np.ones((5, 5))), rng.normal(size=(2, 2, 5, 5)), -np.inf)
    return *y, *softmax(scores)


def expected(case):
    y, y_fp, y_aug, a, a_fp = case
    cosine = lambda u, v: np.mean([u_ @ v_ / np.sqrt(u_ @ u_) / np.sqrt(v_ @ v_) for u_, v_ in zip(u, v, strict=True)])
    flat = lambda z: z.reshape(-1, z.shape[-1])

    def divergence(p, q):
        rows = [
            sum(x * np.log(x / z) for x, z in zip(r, s, strict=True) if x > 0)
            for r, s in zip(flat(p), flat(q), strict=True)
        ]
        return np.mean(rows)

    return {
        "mse": np.mean((y - y_fp) ** 2),
        "mse_aug": np.mean((y - y_aug) ** 2),
        "cosine": -np.log(abs(cosine(flat(y), flat(y_fp)))),
        "cosine_aug": -np.log(abs(cosine(flat(y), flat(y_aug)))),
        "kl": divergence(a, a_fp),
        "kl_reverse": divergence(a_fp, a),
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_term_alone(name, case):
    objective = Objective(**OFF | {name: 1.0})
    used = objective.needs_aug, objective.needs_attention
    assert used == (name.endswith("aug"), name.startswith("kl"))
    args = [jnp.asarray(x, jnp.float32) for x in case]
    args = [
        *args[:2],
        args[2] if used[0] else None,
        *(args[3:] if used[1] else (None, None)),
    ]  # what is not needed is not read
    np.testing.assert_allclose(objective(*args), expected(case)[name], rtol=1e-4)


def test_weighted_sum_of_all_terms(case):
    weights = dict(zip(NAMES, (1.0, 2.0, 0.5, 3.0, 4.0, 0.25), strict=True))
    want = sum(weights[name] * value for name, value in expected(case).items())
    np.testing.assert_allclose(Objective(**weights)(*(jnp.asarray(x, jnp.float32) for x in case)), want, rtol=1e-4)


def test_double_softmax_is_the_authors_form_and_far_smaller(case):
    p, q = case[3:]
    twice = softmax(p) * (np.log(softmax(p)) - np.log(softmax(q)))
    p, q = (jnp.asarray(x, jnp.float32) for x in (p, q))
    np.testing.assert_allclose(softmax_divergence(p, q), twice.mean(), rtol=1e-3)
    assert 50 * float(softmax_divergence(p, q)) < float(attention_divergence(p, q))
    objective = Objective(**OFF | {"kl": 1.0, "double_softmax": True})
    assert objective(None, None, None, p, q) == softmax_divergence(p, q)


def test_cosine_does_not_see_the_sign_and_averages_before_the_logarithm():
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.normal(size=(1, 4, 3)), jnp.float32)
    objective = Objective(**OFF | {"cosine": 1.0})
    np.testing.assert_allclose(objective(y, -2 * y, None, None, None), 0, atol=1e-6)
    flipped = y.at[:, 0].multiply(-1.0)  # cosines -1, 1, 1, 1
    np.testing.assert_allclose(objective(flipped, y, None, None, None), np.log(2), rtol=1e-5)


def test_gradients_are_finite_where_keys_are_hidden_and_outputs_agree(case):
    y, _, _, a, _ = (jnp.asarray(x, jnp.float32) for x in case)
    grads = jax.grad(lambda y, a: Objective()(y, 1.0 * y, 1.0 * y, a, 1.0 * a), argnums=(0, 1))(y, a)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("weights", [OFF, OFF | {"mse": -1.0, "kl": 1.0}])
def test_weights_without_sense_are_refused(weights):
    with pytest.raises(ValueError, match="weights must not be negative, and one must be positive"):
        Objective(**weights)


def test_objectives_with_equal_weights_are_one_static_argument():
    assert hash(Objective()) == hash(dataclasses.replace(Objective(kl=2.0), kl=1.0))
