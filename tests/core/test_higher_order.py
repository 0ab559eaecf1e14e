"""Compressed leaves through control flow and custom derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.formats import Grid, LowRankArray, QuantizedArray

W = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (16, 16)) / 4, Grid(4), (0,))
X = jax.random.normal(jax.random.key(1), (3, 16))
STACK = jax.vmap(lambda w: QuantizedArray.quantize(w, Grid(4), (0,)))(
    jax.random.normal(jax.random.key(2), (4, 16, 16)) / 4
)


@jax.custom_vjp
def halved_gradient(w, x):
    return x @ w


halved_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g / 2, g @ r[0].T / 2))


@jax.custom_jvp
def scaled_tangent(w, x):
    return x @ w


scaled_tangent.defjvp(lambda p, t: (p[1] @ p[0], 3 * (t[1] @ p[0] + p[1] @ t[0])))


def scan_xs(w, x):
    return jax.lax.scan(lambda c, a: (jnp.tanh(c @ a), c.sum()), x, w)


def fori(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w), x)


def while_cond_uses_leaf(w, x):
    return jax.lax.while_loop(lambda c: (c @ w).sum() < 10, lambda c: c + jnp.abs(c @ w) + 1, x)


PROGRAMS = {
    "jit": (lambda w, x: jax.jit(lambda a, b: b @ a)(w, x), W),
    "remat": (lambda w, x: jax.checkpoint(lambda a, b: jnp.tanh(b @ a))(w, x), W),
    "remat policy": (jax.checkpoint(lambda w, x: x @ w, policy=jax.checkpoint_policies.dots_saveable), W),
    "scan": (scan_xs, STACK),
    "scan reverse": (lambda w, x: jax.lax.scan(lambda c, a: (c @ a, None), x, w, reverse=True, unroll=2)[0], STACK),
    "scan const": (lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0], W),
    "fori_loop": (fori, W),
    "while": (while_cond_uses_leaf, W),
    "cond": (lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w), W),
    "switch": (lambda w, x: jax.lax.switch(1, [lambda: x, lambda: x @ w, lambda: 2 * x]), W),
    "custom_vjp": (halved_gradient, W),
    "custom_jvp": (scaled_tangent, W),
    "nested": (lambda w, x: jax.jit(jax.checkpoint(lambda a, b: fori(a, b)))(w, x), W),
    "map": (lambda w, x: jax.lax.map(lambda row: row @ w, x), W),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_result_as_dense_and_nothing_materialised(name):
    fn, w = PROGRAMS[name]
    got, want = jax.jit(compressed(fn))(w, X), fn(w.materialise(), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    seen = explain(fn, w, X)
    assert not seen.materialised and seen.kernels("")
    assert explain(fn, w, X) == seen, "a second look must see the same"


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("while", "scan")])
def test_gradients_through_low_rank_leaves(name):
    fn, w = PROGRAMS[name]
    make = lambda a: LowRankArray.of(a, 2, jax.random.key(3))
    leaf = jax.vmap(make)(w) if w.batch_ndim else make(w)
    loss = lambda up: compressed(fn)(dataclasses.replace(leaf, up=up), X).sum()
    grad = jax.grad(loss)(leaf.up + 0.1)
    step = 1e-3 * jax.random.normal(jax.random.key(4), grad.shape)
    slope = (loss(leaf.up + 0.1 + step) - loss(leaf.up + 0.1 - step)) / 2
    scale = jnp.abs(grad).sum() * 1e-3
    assert float(jnp.abs(jnp.vdot(grad, step) - slope)) < 0.05 * float(scale) + 1e-5


def test_custom_derivatives_of_dense_operands_are_kept():
    """A custom_vjp that meets no compressed leaf keeps its rule inside a compressed function."""
    fn = lambda w, v, x: halved_gradient(v, x) @ w
    v = jnp.eye(16)
    grad = jax.grad(lambda v: compressed(fn)(W, v, X).sum())(v)
    dense = jax.grad(lambda v: (halved_gradient(v, X) @ W.materialise()).sum())(v)
    np.testing.assert_allclose(grad, dense, rtol=1e-4, atol=1e-5)


def test_carried_leaf_is_materialised_and_said():
    fn = lambda w, x: jax.lax.fori_loop(0, 2, lambda i, c: (c[0], c[1] @ c[0]), (w * 1.0, x))[1]
    seen = explain(fn, W, X)
    assert seen.materialised
    np.testing.assert_allclose(compressed(fn)(W, X), fn(W.materialise(), X), rtol=1e-4, atol=1e-5)


def test_flags_among_the_arguments_stay_python_values():
    fn = lambda w, x, train, scale=2.0, name="a": (x @ w) * (scale if train and name == "a" else 0.0)
    np.testing.assert_allclose(compressed(fn)(W, X, True, scale=3.0), 3 * (X @ W.materialise()), rtol=1e-4, atol=1e-4)
