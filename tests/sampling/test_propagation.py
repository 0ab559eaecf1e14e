"""Error propagation: the closed forms against brute-force runs of linear denoisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.compensate.propagation import phi, propagate, window_weights
from jaxcomp.sampling.compensate.trajectory import Model, shared_outputs, trajectory
from jaxcomp.sampling.denoiser import whole

SIZE = 3
COSINE = schedules.cosine_betas()
GRIDS = {"ddim": schedules.vp_grid(COSINE, 12, "leading"), "euler": schedules.flow_grid(12)}
SOLVERS = {
    "ddim": solvers.ddim(GRIDS["ddim"]),
    "euler": solvers.euler_flow(GRIDS["euler"]),
    "dpmpp_2m": solvers.dpmpp_2m(schedules.vp_grid(COSINE, 16, "leading")),
}


def linear(params, x, t, cond):
    """F(x, t) = cos(t / 400) G x + g t / 1000: linear in x, another map at every t."""
    del cond
    wide = t.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.cos(wide / 400) * (x @ params["G"]) + params["g"].reshape(*[1] * (x.ndim - 1), -1) * wide / 1000


LINEAR = whole(linear)


def model(seed, strength=1.0):
    keys = jax.random.split(jax.random.key(seed))
    return Model(
        LINEAR,
        {"G": 0.3 * strength * jax.random.normal(keys[0], (SIZE, SIZE)), "g": jax.random.normal(keys[1], (SIZE,))},
    )


NOISE = jax.random.normal(jax.random.key(5), (4, 2, SIZE))


def output_jacobian(of, solver, states):
    """delta -> d output / d x delta: linear, so that a difference of two outputs is exact."""
    plain = {"G": of.params["G"], "g": jnp.zeros(SIZE)}

    def jvp(i, delta):
        row = jax.tree.map(lambda v: jnp.asarray(v)[i], solver)
        t = jnp.full((len(delta),), row.t)
        return row.skip * delta + row.gain * linear(plain, row.in_scale * delta, t, None)

    return jvp


@pytest.mark.parametrize("name", SOLVERS)
def test_first_order_propagation_is_exact_for_linear_denoisers(name):
    solver, full = SOLVERS[name], model(0)
    other = Model(LINEAR, jax.tree.map(lambda v: v * 1.05, full.params))
    reference, wrong = (trajectory(m, solver, NOISE, None) for m in (full, other))
    errors = wrong.outputs - shared_outputs(full, solver, wrong.states, None)
    found = propagate(solver, errors, output_jacobian(full, solver, reference.states))
    scale = float(jnp.abs(wrong.states).max())
    np.testing.assert_allclose(found, wrong.states - reference.states, atol=1e-5 * scale)


@pytest.mark.parametrize("name", SOLVERS)
def test_dropping_the_jacobian_is_exact_where_outputs_do_not_depend_on_x(name):
    solver = SOLVERS[name]
    if name == "dpmpp_2m":
        solver = solvers.dpmpp_2m(schedules.vp_grid(COSINE, 16, "leading"), "x0")
    full, other = model(0, strength=0.0), model(1, strength=0.0)
    reference, wrong = (trajectory(m, solver, NOISE, None) for m in (full, other))
    errors = wrong.outputs - reference.outputs
    scale = float(jnp.abs(wrong.states).max())
    np.testing.assert_allclose(propagate(solver, errors), wrong.states - reference.states, atol=1e-5 * scale)


def test_closed_form_is_the_sum_of_propagated_errors():
    solver = SOLVERS["ddim"]
    errors = jax.random.normal(jax.random.key(2), (solver.steps, 1, 1, SIZE))
    table, b = phi(solver.a), np.asarray(solver.b, np.float64)[:, 0]
    for n in (1, 5, solver.steps):
        expected = sum(table[n, i + 1] * b[i] * np.asarray(errors[i], np.float64) for i in range(n))
        np.testing.assert_allclose(propagate(solver, errors)[n], expected, rtol=2e-4)


@pytest.mark.parametrize(("name", "level"), [("ddim", "alpha"), ("euler", None)])
def test_phi_telescopes(name, level):
    grid = GRIDS[name]
    levels = np.ones(grid.steps + 1) if level is None else getattr(grid, level)
    found = phi(levels[1:] / levels[:-1])
    expected = np.tril(levels[:, None] / levels[None, :])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_whole_window_is_the_whole_sum(name):
    solver = SOLVERS[name]
    outputs = jax.random.normal(jax.random.key(3), (solver.steps, 1, SIZE))
    k = jax.random.uniform(jax.random.key(4), (solver.steps, SIZE))
    weights = window_weights(solver, k, solver.steps)
    deltas = propagate(solver, k[:, None] * outputs)
    for i in (0, 3, solver.steps - 1):
        newest = np.asarray(outputs)[i::-1, 0]
        found = (weights[i, : i + 1] * newest).sum(0)
        np.testing.assert_allclose(found, deltas[i + 1, 0], rtol=1e-3, atol=1e-5)


def test_window_of_one_earlier_step_has_the_coefficients_of_the_paper():
    solver, k = SOLVERS["ddim"], jnp.linspace(0.1, 0.2, 12)[:, None]
    weights = window_weights(solver, k, 1)
    a, b = np.asarray(solver.a), np.asarray(solver.b)[:, 0]
    np.testing.assert_allclose(weights[1:, 0, 0], (b * np.asarray(k)[:, 0])[1:], rtol=1e-6)
    np.testing.assert_allclose(weights[1:, 1, 0], a[1:] * b[:-1] * np.asarray(k)[:-1, 0], rtol=1e-6)
    assert weights[0, 1, 0] == 0
