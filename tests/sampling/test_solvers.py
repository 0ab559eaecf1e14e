"""Solvers against direct restatements of their papers, in float64 numpy, and against exact denoisers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.sampling import schedules as s
from jaxcomp.sampling import solvers
from jaxcomp.sampling.denoiser import whole
from jaxcomp.sampling.exact import flow_levels_of, levels_of, mixture
from jaxcomp.sampling.loop import sample

BETAS = s.linear_betas(100, 1e-3, 0.2)
FINE = levels_of(s.vp_grid(BETAS, 100))
MEAN, STD = 0.7, 0.4


def network(t):
    """Some smooth function of x and t, in numpy."""
    return lambda x: np.tanh(0.5 * x + 0.01 * t) + 0.1 * x


def follow(solver, x, f=network):
    """The recurrence of `LinearSolver`, restated."""
    outputs, c = (
        [],
        {k: np.asarray(getattr(solver, k), np.float64) for k in ("t", "in_scale", "skip", "gain", "a", "b")},
    )
    for i in range(solver.steps):
        outputs.insert(0, c["skip"][i] * x + c["gain"][i] * f(c["t"][i])(c["in_scale"][i] * x))
        x = c["a"][i] * x + sum(c["b"][i, j] * o for j, o in enumerate(outputs[: c["b"].shape[1]]))
    return x


X = np.linspace(-1.5, 1.5, 7)


def test_ddim_is_its_formula():
    t, alpha, sigma = grid = s.vp_grid(BETAS, 12)
    x = X
    for i in range(12):
        eps = network(t[i])(x)
        x = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
    assert follow(solvers.ddim(grid), X) == pytest.approx(x, rel=2e-6, abs=2e-6)


def test_dpmpp_is_its_formula():
    t, alpha, sigma = grid = s.vp_grid(BETAS, 20)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    x, previous = X, None
    for i in range(20):
        d = (x - sigma[i] * network(t[i])(x)) / alpha[i]
        h, combined = lam[i + 1] - lam[i], d
        if 0 < i < 19:
            r = (lam[i] - lam[i - 1]) / h
            combined = (1 + 1 / (2 * r)) * d - previous / (2 * r)
        x, previous = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * combined, d
    assert follow(solvers.dpmpp_2m(grid), X) == pytest.approx(x, rel=5e-6, abs=5e-6)


def test_heun_is_its_algorithm():
    sigma, sd = s.karras_grid(9).sigma, 0.5

    def denoise(x, level):
        norm = np.sqrt(level**2 + sd**2)
        return (sd / norm) ** 2 * x + level * sd / norm * network(np.log(level) / 4)(x / norm)

    x = 80 * X
    for s0, s1 in itertools.pairwise(sigma):
        slope = (x - denoise(x, s0)) / s0
        new = x + (s1 - s0) * slope
        if s1:
            new = x + (s1 - s0) * (slope + (new - denoise(new, s1)) / s1) / 2
        x = new
    solver = solvers.edm_heun(s.karras_grid(9))
    assert solver.steps == 17
    assert follow(solver, 80 * X) == pytest.approx(x, rel=1e-5, abs=1e-4)


def test_first_order_dpmpp_is_ddim():
    grid = s.vp_grid(BETAS, 10)
    first = solvers.dpmpp_2m(grid)
    first = jax.tree.map(np.asarray, first)
    merged = np.stack([first.b.sum(1), 0 * first.b[:, 1]], 1)
    first = solvers.LinearSolver(**{**vars(first), "b": merged})
    assert follow(first, X) == pytest.approx(follow(solvers.ddim(grid), X), rel=5e-6, abs=5e-6)


def test_ancestral_ddim_is_ddpm_with_posterior_variance():
    grid = s.vp_grid(BETAS, 10)
    a, b = solvers.ddpm(grid), solvers.ddim(grid, eta=1.0)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x == pytest.approx(y)
    beta = 1 - (grid.alpha[:-1] / grid.alpha[1:]) ** 2
    assert a.a == pytest.approx(1 / np.sqrt(1 - beta), rel=1e-6)
    assert a.b[:, 0] == pytest.approx(-beta / (grid.sigma[:-1] * np.sqrt(1 - beta)), rel=1e-5)
    assert a.noise[-1] == 0 and solvers.ddpm(grid, variance="beta").noise[:-1] == pytest.approx(np.sqrt(beta)[:-1])


def test_heun_of_zero_denoiser_reaches_zero():
    solver = solvers.edm_heun(s.karras_grid(6))
    zero = solvers.LinearSolver(**{**vars(solver), "skip": 0 * solver.skip, "gain": 0 * solver.gain})
    assert np.all(follow(zero, X) == 0)


def test_euler_of_constant_velocity_is_exact_on_any_grid():
    solver = solvers.euler_flow(s.flow_levels([1.0, 0.9, 0.35, 0.3, 0.0]))
    assert follow(solver, X, lambda t: lambda x: np.full_like(x, 2.5)) == pytest.approx(X - 2.5, abs=1e-6)


@pytest.mark.parametrize("make", [solvers.ddim, solvers.dpmpp_2m])
@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_every_prediction_gives_the_same_samples(make, prediction):
    grid, ends = s.vp_grid(BETAS, 8), []
    for kind in ("eps", prediction):
        denoiser = whole(mixture(np.full((1, 1), MEAN), [STD], FINE, kind))
        run = jax.jit(lambda x, d=denoiser, k=kind: sample(d, (), x, None, make(grid, k), executor="cond")[0])
        ends.append(run(jnp.ones((4, 1))))
    assert ends[0] == pytest.approx(np.asarray(ends[1]), abs=1e-4)


def edm_mixture(params, x, t, cond):
    """The exact preconditioned network F of one Gaussian for EDM."""
    sigma = jnp.exp(4 * t)[:, None]
    norm = jnp.sqrt(sigma**2 + 0.25)
    raw = x * norm
    clean = MEAN + STD**2 / (STD**2 + sigma**2) * (raw - MEAN)
    return (clean - 0.25 / norm**2 * raw) * norm / (0.5 * sigma)


def problem(name, steps):
    """(grid, solver, network) of data that is one Gaussian."""
    gaussian = lambda levels, kind: mixture(np.full((1, 1), MEAN), [STD], levels, kind)
    if name == "edm_heun":
        grid = s.karras_grid(steps, largest=20.0)
        return grid, solvers.edm_heun(grid), edm_mixture
    if name == "euler_flow":
        grid = s.flow_grid(steps)
        return grid, solvers.euler_flow(grid), gaussian(flow_levels_of(), "flow")
    if name == "dpmpp_2m":  # even in log SNR, and not down to 0
        grid = s.flow_levels(1 / (1 + np.exp(np.linspace(-4, 4, steps + 1))))
        return grid, solvers.dpmpp_2m(grid, "flow"), gaussian(flow_levels_of(), "flow")
    betas = s.linear_betas(1024)
    grid = s.vp_grid(betas, steps)
    return grid, solvers.ddim(grid), gaussian(levels_of(s.vp_grid(betas, 1024)), "eps")


def end_error(name, steps):
    """Largest error of the samples against the exact end of the probability flow."""
    grid, solver, network = problem(name, steps)
    spread = lambda i: np.sqrt((grid.alpha[i] * STD) ** 2 + grid.sigma[i] ** 2)
    x = np.linspace(-2, 2, 5, dtype=np.float32)[:, None] * solver.init_std
    want = grid.alpha[-1] * MEAN + spread(-1) / spread(0) * (x - grid.alpha[0] * MEAN)
    got = jax.jit(lambda x: sample(whole(network), (), x, None, solver, executor="cond")[0])(x)
    return float(np.abs(np.asarray(got) - want).max())


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler_flow", 1), ("dpmpp_2m", 2), ("edm_heun", 2)])
def test_order_of_convergence_on_a_gaussian(name, order):
    coarse, fine = end_error(name, 16), end_error(name, 64)
    assert np.log(coarse / fine) / np.log(4) > order - 0.25, (coarse, fine)


def test_ddpm_reaches_the_moments_of_a_mixture():
    means, stds = np.array([[-1.0], [1.0]]), [0.3, 0.3]
    denoiser = whole(mixture(means, stds, FINE))
    solver = solvers.ddpm(s.vp_grid(BETAS, 100))
    noise, key = jax.random.split(jax.random.key(0))
    x = solver.initial(noise, (4096, 1))
    got, trace = jax.jit(lambda x, key: sample(denoiser, (), x, None, solver, key=key))(x, key)
    got = np.asarray(got)[:, 0]
    assert int(trace.nfe) == 100
    assert got.mean() == pytest.approx(0, abs=0.06)
    assert (got**2).mean() == pytest.approx(1 + 0.3**2, abs=0.06)
    assert np.abs(got).mean() == pytest.approx(1.0, abs=0.03)
    assert (np.abs(np.abs(got) - 1) < 0.9).mean() > 0.99


def test_churn_keeps_the_gaussian():
    solver = solvers.edm_heun(s.karras_grid(18, largest=20.0), churn=9.0)
    assert solver.stochastic and solver.init_std > 20
    noise, key = jax.random.split(jax.random.key(1))
    run = jax.jit(lambda x, key: sample(whole(edm_mixture), (), x, None, solver, key=key, executor="cond")[0])
    got = np.asarray(run(solver.initial(noise, (4096, 1)), key))
    assert got.mean() == pytest.approx(MEAN, abs=0.03) and got.std() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: solvers.ddim(s.flow_grid(4)), "not finite|at step 0"),
        (lambda: solvers.ddim(s.vp_grid(BETAS, 4), "noise"), "prediction 'noise' is unknown"),
        (lambda: solvers.ddim(s.vp_grid(BETAS, 4), eta=2.0), "eta"),
        (lambda: solvers.ddpm(s.vp_grid(BETAS, 4), variance="learned"), "variance"),
        (lambda: solvers.euler_flow(s.vp_grid(BETAS, 4)), "alpha \\+ sigma = 1"),
        (lambda: solvers.edm_heun(s.vp_grid(BETAS, 4)), "karras_grid"),
    ],
)
def test_solvers_refuse_what_they_cannot_do(make, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(ValueError, match=message):
        make()
