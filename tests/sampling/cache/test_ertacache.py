"""ERTACache: identities, exactness where theory promises it, and the order of its variants on a mixture's exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_sampler as toy

from jaxcomp.data.embedded_dit import load_digits_dit
from jaxcomp.io.files import CheckpointError
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.cache import ertacache
from jaxcomp.sampling.cache.ertacache import ERTACacheConfig, ErtaPlan, ErtaSettings
from jaxcomp.sampling.cache.ertacache.plan import greedy, plan_dp, plan_from_profile, reuse_errors
from jaxcomp.sampling.cache.ertacache.profile import store
from jaxcomp.sampling.cache.ertacache.rectify import follow, ols, paper_coefficients, rectifier
from jaxcomp.sampling.cache.ertacache.timesteps import adjust, flow_steps, with_steps
from jaxcomp.sampling.cache.quality import quality
from jaxcomp.sampling.cache.uniform import spread
from jaxcomp.sampling.denoiser import whole
from jaxcomp.sampling.exact import flow_levels_of, mixture
from jaxcomp.sampling.loop import sample
from jaxcomp.sampling.network import network
from jaxcomp.sampling.pipeline import Pipeline, with_cache

STEPS = 12
RNG = np.random.default_rng(0)
PARAMS = toy.init()
PIPELINE = Pipeline(toy.denoiser, toy.flow(STEPS))


def residuals(pipeline, params, x, cond, keep_output=False):
    """Cached quantities of a full run, computed step by step."""
    solver, kept = pipeline.solver, []
    for i in range(solver.steps):
        h, c = pipeline.denoiser.embed(params, x, jnp.full(len(x), solver.t[i]), cond)
        new = pipeline.denoiser.trunk(params, h, c, lambda n, f, v: f(v))
        kept.append(np.asarray(new if keep_output else new - h))
        x = x + solver.b[i, 0] * pipeline.denoiser.head(params, new, c)
    return np.stack(kept)


@pytest.fixture(scope="module")
def measured():
    return ertacache.profile(PIPELINE, PARAMS, toy.noise(), toy.LABELS, window=4)


def test_profile_is_its_definition(measured):
    r = residuals(PIPELINE, PARAMS, toy.noise(), toy.LABELS)
    for a in range(STEPS):
        for j in range(4):
            if (b := a + 1 + j) >= STEPS:
                assert np.isnan(measured.ratio_of_sums[a, j])
                continue
            far, size = np.abs(r[a] - r[b]), np.abs(r[b])
            assert measured.ratio_of_sums[a, j] == pytest.approx(far.sum() / size.sum(), rel=1e-3)
            assert measured.mean_of_ratios[a, j] == pytest.approx((far.sum(1) / size.sum(1)).mean(), rel=1e-3)


def test_greedy_plan_is_the_paper_s_walk_over_stored_residuals(measured):
    r = residuals(PIPELINE, PARAMS, toy.noise(), toy.LABELS)
    for threshold in (0.0, 0.02, 0.05, 0.1):
        kept, want = r[0], [True]
        for k in range(1, STEPS):
            far = np.abs(kept - r[k]).sum() / np.abs(r[k]).sum()
            want.append(not far < threshold or k == STEPS - 1)
            kept = r[k] if want[-1] else kept
        runs = max(map(len, "".join(str(int(w)) for w in want).split("1")))
        if runs <= 4:
            assert greedy(measured.ratio_of_sums, threshold).tolist() == want
    assert greedy(measured.ratio_of_sums, 0.0).all()


def random_profile(steps=14, window=6):
    errors = np.cumsum(RNG.uniform(0.01, 1, (steps, window)), 1)
    a, j = np.indices(errors.shape)
    return np.where(a + 1 + j < steps, errors, np.nan)


def test_plans_have_the_wanted_number_of_steps_and_dp_is_optimal():
    errors, dt = random_profile(), RNG.uniform(0.5, 1.5, 14)
    cost = lambda mask: (dt * reuse_errors(errors, mask)).sum()
    for n in range(4, 15):
        erta, best = plan_from_profile(errors, computed=n), plan_dp(errors, dt, n)
        assert erta.sum() == best.sum() == n and all(m[0] and m[-1] for m in (erta, best))
        assert cost(best) <= cost(erta) + 1e-12
        for _ in range(200):  # random plans with the ends and short enough runs
            mask = np.isin(np.arange(14), [0, 13, *(1 + RNG.permutation(12)[: n - 2])])
            if np.diff(np.flatnonzero(mask)).max() <= 7:
                assert cost(best) <= cost(mask) + 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "exactly one"),
        (dict(threshold=0.1, computed=3), "exactly one"),
        (dict(threshold=-1.0), "at least 0"),
        (dict(computed=2), r"must lie in 3\.\.14"),
        (dict(computed=15), r"must lie in 3\.\.14"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_from_profile(random_profile(), **options)


def test_time_is_conserved_and_unit_factors_change_nothing():
    base = flow_steps(toy.flow(STEPS))
    assert base.sum() == pytest.approx(1, abs=1e-6)
    for _ in range(20):
        mask, phi = RNG.random(STEPS) < 0.5, RNG.uniform(0.01, 1, STEPS)
        dt = adjust(base, mask, phi)
        assert dt.sum() == pytest.approx(1, abs=1e-6) and (dt > 0).all()
        solver = with_steps(toy.flow(STEPS), dt)
        assert -solver.b.sum() == pytest.approx(1, abs=1e-6) and solver.t[0] == pytest.approx(1000)
        assert solver.t[1:] == pytest.approx(1000 * (1 - np.cumsum(dt))[:-1], abs=1e-2)
    same = with_steps(toy.flow(STEPS), adjust(base, np.zeros(STEPS, bool), np.ones(STEPS)))
    assert same.b == pytest.approx(toy.flow(STEPS).b, abs=1e-6) and same.t == pytest.approx(toy.flow(STEPS).t, abs=1e-3)
    with pytest.raises(ValueError, match="set phi_min"):
        adjust(base, np.zeros(STEPS, bool), np.zeros(STEPS))
    with pytest.raises(ValueError, match="phi='off'"):
        flow_steps(solvers.ddim(schedules.vp_grid(schedules.linear_betas(), 4)))


def test_least_squares_is_the_linearised_predictor():
    v = RNG.standard_normal((500, 3)).astype(np.float32) + 1
    error = (0.3 * v - 0.2 + 0.1 * RNG.standard_normal(v.shape)).astype(np.float32)
    k, b = (np.asarray(a) for a in ols(jnp.asarray(v), jnp.asarray(error)))
    K, B = paper_coefficients(k, b)
    assert (K * v + B) / 4 + 0.5 == pytest.approx(k * v + b, abs=1e-6)
    S = lambda a, c: ((a - a.mean(0)) * (c - c.mean(0))).mean(0)
    assert K == pytest.approx(4 * S(v, error) / S(v, v), rel=1e-4)
    assert B == pytest.approx(4 * (error.mean(0) - 0.5) - K * v.mean(0), abs=1e-4)
    rest = error - (k * v + b)
    assert np.abs(rest.mean(0)).max() < 1e-5
    assert max(abs(np.corrcoef(rest[:, i], v[:, i])[0, 1]) for i in range(3)) < 1e-4
    flat = ols(jnp.full((10, 1), 5.0), jnp.full((10, 1), 0.25))
    assert (float(flat[0][0]), float(flat[1][0])) == (0.0, 0.25)


def affine(params, x, t, cond):
    """v = a(t) x + c(t) per channel."""
    s = t[:, None] / 1000
    channel = jnp.arange(1.0, 1 + x.shape[1])[None]
    return -(0.5 + s * channel / 3) * x + jnp.sin(3 * s + channel)


def test_sequential_refit_is_exact_on_affine_fields_and_one_shot_is_not():
    solver, x = toy.flow(STEPS), toy.noise(64)
    mask = np.isin(np.arange(STEPS), [0, 3, 4, 8])
    denoiser = whole(affine)
    full = sample(denoiser, (), x, None, solver)[0]
    errors = {}
    for name, sequential in (("sequential", True), ("one-shot", False)):
        seen = jax.jit(lambda x, s=sequential: follow(denoiser, store("out"), (), x, None, solver, mask, rectified=s))(
            x
        )
        run = ertacache.run_plan(denoiser, "out", (), x, None, solvers.anonymous(solver), mask, seen.k, seen.b)
        errors[name] = float(jnp.abs(run - full).max())
    none = np.zeros((STEPS, 1), np.float32)
    plain = ertacache.run_plan(denoiser, "out", (), x, None, solvers.anonymous(solver), mask, none, none)
    errors["none"] = float(jnp.abs(plain - full).max())
    assert errors["sequential"] < 2e-5 < 100 * errors["sequential"] < errors["one-shot"] < errors["none"]


def test_deviation_of_a_field_of_time_is_the_weighted_sum_of_errors():
    velocity = lambda t: jnp.stack([jnp.sin(5 * t), t**2], -1)
    denoiser = whole(lambda p, x, t, cond: velocity(t / 1000))
    solver, x = toy.flow(STEPS), jax.random.normal(jax.random.key(0), (3, 2))
    mask = np.isin(np.arange(STEPS), [0, 5, 7])
    config = ERTACacheConfig(ErtaPlan(mask, np.zeros(STEPS), *(np.zeros((STEPS, 1), np.float32),) * 2), "out")
    pipeline = Pipeline(denoiser, solver)
    deviation = np.asarray(with_cache(pipeline, config)((), x)[0] - pipeline((), x)[0])
    last = np.maximum.accumulate(np.where(mask, np.arange(STEPS), 0))
    t = np.asarray(solver.t) / 1000
    want = (solver.b * np.asarray(velocity(t[last]) - velocity(t))).sum(0)
    assert deviation == pytest.approx(np.broadcast_to(want, deviation.shape), abs=1e-6)


MEANS = np.random.default_rng(1).choice([-1.0, 1.0], (5, 6))
FIELD = Pipeline(whole(mixture(MEANS, [0.15] * 5, flow_levels_of(), "flow")), toy.flow(30))


@pytest.fixture(scope="module")
def calibration():
    return FIELD.solver.initial(jax.random.key(0), (64, 6))


@pytest.fixture(scope="module")
def trained():
    """The digits of the package: (pipeline, params, calibration batch, evaluation batch)."""
    model, params = load_digits_dit("flow")
    pipeline = Pipeline(network(model), toy.flow(30))
    batch = lambda key, n: (jax.random.normal(jax.random.key(key), (n, 4, 4, 4)), jnp.arange(n) % 10)
    return pipeline, params, batch(0, 64), batch(1, 64)


@pytest.mark.parametrize("mode, gain", [("out", -0.6), ("out_res", 3.0)])
def test_order_of_the_variants_on_trained_digits(trained, mode, gain):
    pipeline, params, calibration, evaluation = trained
    solver, none = pipeline.solver, np.zeros((30, 1), np.float32)
    run = lambda solver, *plan: ertacache.run_plan(
        pipeline.denoiser, mode, params, *evaluation, solvers.anonymous(solver), *plan
    )
    full = np.asarray(run(solver, np.ones(30, bool), none, none))
    psnr = lambda x: quality(x, full).psnr.mean()
    settings = ErtaSettings(computed=15, mode=mode, phi="off", gate=False)
    plan = ertacache.calibrate(pipeline, settings, params, *calibration).config.plan
    planned, evenly = psnr(run(solver, plan.mask, none, none)), psnr(run(solver, spread(30, 15), none, none))
    rectified = psnr(run(solver, plan.mask, plan.k, plan.b))
    few = psnr(run(toy.flow(15), np.ones(15, bool), none[:15], none[:15]))
    assert planned > evenly + 3
    assert min(planned, rectified) > few + 2
    assert rectified > planned + gain


def test_the_gate_never_keeps_what_makes_calibration_worse(calibration):
    for phi in ("v", "dv"):
        found = ertacache.calibrate(
            FIELD, ErtaSettings(computed=12, mode="out", phi=phi, phi_min=0.05), (), calibration
        )
        assert set(found.errors) == {"plan", "plan + rectification", "time", "time + rectification"}
        kept = found.errors[min(found.errors, key=found.errors.get)]
        got = with_cache(FIELD, found.config)((), calibration, executor="cond")[0]
        want = FIELD((), calibration, executor="cond")[0]
        assert float(jnp.square(got - want).mean()) == pytest.approx(kept, rel=1e-3)
    assert found.phi.min() == pytest.approx(0.05)  # against ||v - v of the step before|| reuse stands still


def test_plans_of_disjoint_calibration_sets_agree(calibration):
    plans = [
        ertacache.calibrate(FIELD, ErtaSettings(computed=15, mode="out"), (), calibration[part]).config.plan
        for part in (slice(0, 20), slice(20, 40))
    ]
    assert np.mean(plans[0].mask == plans[1].mask) >= 0.8


def test_full_plan_is_the_uncached_sampler():
    plan = ErtaPlan(np.ones(STEPS, bool), np.zeros(STEPS), *(np.zeros((STEPS, 1), np.float32),) * 2)
    for mode in ("trunk", "out"):
        got = jax.jit(with_cache(PIPELINE, ERTACacheConfig(plan, mode)))(PARAMS, toy.noise(), toy.LABELS)[0]
        assert got == pytest.approx(np.asarray(jax.jit(PIPELINE)(PARAMS, toy.noise(), toy.LABELS)[0]), abs=1e-6)


def test_plan_survives_the_disk_and_is_refused_elsewhere(tmp_path, measured):
    found = ertacache.calibrate(
        PIPELINE, ErtaSettings(computed=6, window=4), PARAMS, toy.noise(), toy.LABELS, measured=measured
    )
    path = tmp_path / "plan.safetensors"
    ertacache.save(path, found.config, PARAMS, PIPELINE.solver)
    again = ertacache.load(path, PARAMS, PIPELINE.solver)
    for a, b in zip(again.plan, found.config.plan, strict=True):
        assert np.array_equal(a, b)
    for arguments, named in (
        ((toy.init(1), PIPELINE.solver), "model"),
        ((PARAMS, toy.flow(STEPS, shift=2.0)), "solver"),
        ((PARAMS, PIPELINE.solver, 3.0), "guidance"),
        ((PARAMS, PIPELINE.solver, 1.0, "out"), "plan"),
    ):
        with pytest.raises(CheckpointError, match=f"{named} "):
            ertacache.load(path, *arguments)
    for solver in (toy.flow(STEPS + 1), toy.flow(STEPS, shift=2.0)):
        with pytest.raises(ValueError, match="calibrate again"):
            with_cache(PIPELINE.replace(solver=solver), found.config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ErtaSettings(computed=3, phi="z"), "phi: expected one of v, dv, off"),
        (lambda: ErtaSettings(computed=3, phi_min=0.0), "phi_min"),
        (lambda: ErtaSettings(planner="erta-dp"), "needs the number"),
        (lambda: ertacache.profile(PIPELINE, PARAMS, toy.noise(), toy.LABELS, window=0), "window"),
        (lambda: ertacache.profile(PIPELINE, PARAMS, toy.noise(), toy.LABELS, mode="head"), "mode 'head' is unknown"),
        (lambda: plan_dp(random_profile(), np.ones(14), 2), "widen the window"),
        (lambda: rectifier(np.zeros((4, 3)), np.zeros((4, 3))).init(jnp.zeros((1, 5))), "expected 5 channels, found 3"),
    ],
)
def test_bad_settings_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
