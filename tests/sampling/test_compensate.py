"""TCEC, PTQD and TAC: exact cases, attenuation by rounding noise, keys, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.io.files import CheckpointError
from jaxcomp.sampling import schedules, solvers
from jaxcomp.sampling.compensate import key as keys
from jaxcomp.sampling.compensate import ptqd, tac, tcec
from jaxcomp.sampling.compensate.select import select_gain
from jaxcomp.sampling.compensate.tcec import Tcec, TcecConfig
from jaxcomp.sampling.compensate.trajectory import Model, trajectory
from jaxcomp.sampling.corrector import Corrector
from jaxcomp.sampling.denoiser import whole
from jaxcomp.sampling.loop import sample

SIZE = 4
SOLVER = solvers.ddim(schedules.vp_grid(schedules.cosine_betas(), 10, "leading"))
NOISE, OTHER = jax.random.normal(jax.random.key(0), (2, 64, 3, SIZE))
MODES = [
    TcecConfig("ls2", "closed_loop"),
    TcecConfig("inplace", "closed_loop"),
    TcecConfig("window1", "closed_loop"),
    *(TcecConfig(mode, fit) for mode in ("inplace", "window1", "window1_alt") for fit in ("paper", "ptqd", "tac")),
]


def smooth(params, x, t, cond):
    """A bounded, nonlinear denoiser whose outputs follow its inputs, as those of trained ones do."""
    del cond
    wide = t.reshape(-1, *[1] * (x.ndim - 1))
    return params["gain"] * (jnp.tanh(x @ params["w"]) + 0.3 * x * jnp.cos(wide / 500))


DENOISER = whole(smooth)
PARAMS = {"w": jnp.eye(SIZE) + 0.2 * jax.random.normal(jax.random.key(1), (SIZE, SIZE)), "gain": jnp.float32(1)}
FULL = Model(DENOISER, PARAMS)


def scaled(k):
    """f_q = f / (1 - k): the local error is k o~ exactly."""
    return Model(DENOISER, PARAMS | {"gain": jnp.float32(1 / (1 - k))})


def run(model, corrector=None, noise=OTHER):
    return jax.jit(lambda p, x: sample(model.denoiser, p, x, None, SOLVER, corrector=corrector, executor="cond")[0])(
        model.params, noise
    )


def test_inplace_undoes_a_scaled_output_and_the_window_removes_it_twice():
    wrong, exact = scaled(0.1), run(FULL)
    coefficients = {
        mode: tcec.calibrate(FULL, wrong, SOLVER, NOISE, None, TcecConfig(mode, "paper"))
        for mode in ("inplace", "window1")
    }
    np.testing.assert_allclose(run(wrong, tcec.tcec(coefficients["inplace"])), exact, atol=1e-5)
    assert float(jnp.abs(run(wrong, tcec.tcec(coefficients["window1"])) - exact).max()) > 0.05
    one = Tcec(coefficients["window1"].weights.at[:, 1].set(0.0), coefficients["window1"].offset)
    np.testing.assert_array_equal(one.weights[:, :1], coefficients["inplace"].weights)
    np.testing.assert_allclose(run(wrong, tcec.tcec(one)), exact, atol=1e-5)


def test_least_squares_recover_the_scaled_output():
    found = tcec.calibrate(FULL, scaled(0.1), SOLVER, NOISE, None, TcecConfig(ridge=1e-7))
    b = np.asarray(SOLVER.b)
    np.testing.assert_allclose(found.weights[:, 0], np.broadcast_to(0.1 * b, (SOLVER.steps, SIZE)), atol=2e-4)
    np.testing.assert_allclose(found.weights[:, 1], 0, atol=2e-4)
    np.testing.assert_allclose(found.offset, 0, atol=1e-5)


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{c.fit}")
def test_nothing_is_corrected_without_quantization(config):
    found = tcec.calibrate(FULL, FULL, SOLVER, NOISE, None, config)
    assert max(float(jnp.abs(v).max()) for v in found) < 1e-5
    np.testing.assert_allclose(run(FULL, tcec.tcec(found)), run(FULL), atol=1e-4)


def test_off_is_the_identity():
    found = tcec.calibrate(FULL, scaled(0.1), SOLVER, NOISE, None, TcecConfig("off"))
    np.testing.assert_array_equal(run(FULL, tcec.tcec(found)), run(FULL))


@pytest.mark.parametrize("module", [ptqd, tac])
def test_rivals_undo_a_scaled_output(module):
    wrong = scaled(0.1)
    found = module.calibrate(FULL, wrong, SOLVER, NOISE, None)
    corrected = run(wrong, getattr(module, module.__name__.split(".")[-1])(found))
    plain, exact = run(wrong), run(FULL)
    share = 1e-3 if module is ptqd else 0.5  # TAC rescales large positive outputs only
    assert float(jnp.square(corrected - exact).mean()) < share * float(jnp.square(plain - exact).mean())


def test_regression_on_the_quantized_output_is_attenuated_by_independent_noise():
    outputs = jax.random.normal(jax.random.key(2), (2, 200_000, SIZE))
    rounded = outputs + 0.3 * jax.random.normal(jax.random.key(3), outputs.shape)
    paper, _ = tcec.local_error(TcecConfig("inplace", "paper"), rounded, outputs)
    expected = ((rounded - outputs) ** 2).mean(1) / (rounded**2).mean(1)
    np.testing.assert_allclose(paper, expected, rtol=0.05, atol=0.005)
    inverted, _ = tcec.local_error(TcecConfig("inplace", "ptqd"), rounded, outputs)
    np.testing.assert_allclose(inverted, 0, atol=0.005)
    np.testing.assert_allclose(ptqd.fit(rounded, outputs).k, 0, atol=0.005)


def test_ptqd_finds_slope_bias_and_residual():
    full = jax.random.normal(jax.random.key(4), (3, 20_000, SIZE))
    bias = jnp.arange(SIZE, dtype=jnp.float32)
    found = ptqd.fit(
        full + 0.2 * full + bias[None, None] + 0.05 * jax.random.normal(jax.random.key(5), full.shape), full
    )
    np.testing.assert_allclose(found.k, 0.2, atol=0.005)
    np.testing.assert_allclose(found.bias, jnp.broadcast_to(bias, (3, SIZE)), atol=0.02)
    np.testing.assert_allclose(found.residual, 0.05, rtol=0.05)


def test_stochastic_solvers_draw_less_noise_where_the_error_is_noise():
    solver = solvers.ddim(schedules.vp_grid(schedules.cosine_betas(), 10, "leading"), eta=1.0)
    found = ptqd.Ptqd(jnp.zeros(10), jnp.zeros((10, SIZE)), jnp.full(10, 0.1))
    less = ptqd.absorb(solver, found)
    expected = np.maximum(np.square(solver.noise) - np.square(0.1 * solver.b[:, 0]), 0)
    np.testing.assert_allclose(np.square(less.noise), expected, atol=1e-7)
    with pytest.raises(ValueError, match="stochastic one-step"):
        ptqd.absorb(SOLVER, found)


def test_relative_fit_follows_its_normal_equation():
    q, r = jax.random.normal(jax.random.key(6), (2, 1, 500, SIZE)) + 3
    mean = lambda v: v.mean((0, 1))
    k = tcec.relative_fit(q, r, mean, 0.5, 0.1, SIZE)
    loss = lambda k: (
        0.5 * mean((k * q - r) ** 2) + 0.5 * SIZE * mean((k * q / r - 1) ** 2) + 0.1 * (k.reshape(-1) - 1) ** 2
    )
    grad = jax.grad(lambda k: loss(k.reshape(1, 1, -1)).sum())(k)
    np.testing.assert_allclose(grad, 0, atol=1e-3)


def test_gain_is_chosen_on_held_out_noises_and_switched_off_where_it_is_of_no_use():
    chosen = select_gain(FULL, scaled(0.1), SOLVER, NOISE, None, gains=(0.5, 1.0))
    assert chosen.config.gain == 1.0 and chosen.decibels[1.0] > chosen.decibels[0.5] > 0.1
    off = select_gain(FULL, FULL, SOLVER, NOISE, None, gains=(1.0,))
    assert off.config.mode == "off" and not float(jnp.abs(off.coefficients.weights).max())
    with pytest.raises(ValueError, match="give more"):
        select_gain(FULL, FULL, SOLVER, NOISE[:1], None)


def test_a_models_own_corrector_acts_first():
    undo = Corrector(on_output=lambda state, out, x, i: (0.9 * out, state))
    found = tcec.calibrate(FULL, dataclasses.replace(scaled(0.1), corrector=undo), SOLVER, NOISE, None)
    assert max(float(jnp.abs(v).max()) for v in found) < 1e-4


def test_scalar_coefficients_are_shared_by_channels():
    found = tcec.calibrate(FULL, scaled(0.1), SOLVER, NOISE, None, TcecConfig(per="scalar"))
    assert found.weights.shape == (SOLVER.steps, 2, 1) and found.offset.shape == (SOLVER.steps, 1)
    assert run(scaled(0.1), tcec.tcec(found)).shape == OTHER.shape


def test_key_is_checked_when_loaded(tmp_path):
    wrong = scaled(0.1)
    found = tcec.calibrate(FULL, wrong, SOLVER, NOISE, None)
    key = keys.key_of(PARAMS, wrong.params, SOLVER, guidance=1.5, plan=[True, False])
    keys.save_calibration(tmp_path / "tcec.safetensors", found, key)
    again = keys.load_calibration(tmp_path / "tcec.safetensors", Tcec, key)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    changes = {"model": "x", "quantized": "y", "solver": "z", "steps": 9, "guidance": 2.0, "plan": "11"}
    for name, value in changes.items():
        with pytest.raises(CheckpointError, match=f"{name}.*do not transfer"):
            keys.load_calibration(tmp_path / "tcec.safetensors", Tcec, key._replace(**{name: value}))
    with pytest.raises(CheckpointError, match="coefficients of Ptqd"):
        keys.load_calibration(tmp_path / "tcec.safetensors", ptqd.Ptqd, key)


def test_digest_sees_every_weight():
    changed = PARAMS | {"w": PARAMS["w"].at[0, 0].add(1e-6)}
    assert keys.digest(PARAMS) == keys.digest(jax.tree.map(np.asarray, PARAMS)) != keys.digest(changed)


def test_bad_input_is_refused():
    calibrate = lambda noise=NOISE, solver=SOLVER, **options: tcec.calibrate(FULL, FULL, solver, noise, None, **options)
    with pytest.raises(ValueError, match="finite latents"):
        calibrate(NOISE.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="batch of at least 1"):
        calibrate(NOISE[:0])
    with pytest.raises(ValueError, match="draws noise"):
        calibrate(solver=solvers.ddpm(schedules.vp_grid(schedules.cosine_betas(), 10, "leading")))
    with pytest.raises(ValueError, match="cannot be fitted"):
        TcecConfig("ls2", "paper")
    with pytest.raises(ValueError, match="mode"):
        TcecConfig("ls3")
    found = Tcec(jnp.zeros((SOLVER.steps, 2, SIZE + 1)), jnp.zeros((SOLVER.steps, SIZE + 1)))
    with pytest.raises(ValueError, match="calibrate this model"):
        run(FULL, tcec.tcec(found))


def test_the_trajectory_is_what_sample_returns():
    np.testing.assert_allclose(trajectory(FULL, SOLVER, OTHER, None).states[-1], run(FULL), atol=1e-5)


def test_coefficients_per_position_undo_errors_that_differ_by_place():
    place = jnp.linspace(-0.3, 0.3, 24).reshape(2, 3, 4)
    rng = np.random.default_rng(0)
    output = jnp.asarray(rng.normal(size=(64, 2, 3, 4)), jnp.float32)
    error = place[None] * output + place[None]
    fit = lambda per: tcec.least_squares(error, (output,), 0.0, per)
    rest = lambda per: float(jnp.abs(error - tcec.combine(*fit(per), (output,))).max())
    assert rest("position") < 1e-5 and rest("channel") > 0.1
    assert [fit(per)[0].shape for per in ("position", "channel", "scalar")] == [(1, 24), (1, 4), (1, 1)]
