import numpy as np
import pytest

from jaxcomp.sampling import schedules as s


def test_betas_end_points_and_cosine_matches_its_definition():
    assert s.linear_betas(10)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert s.scaled_linear_betas(10)[[0, -1]] == pytest.approx([0.00085, 0.012])
    abar = np.cumprod(1 - s.cosine_betas(1000))
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    assert abar[:900] == pytest.approx(f(np.arange(1, 901) / 1000) / f(0), rel=1e-9)


def test_timestep_spacings():
    assert s.timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert s.timesteps(1000, 4, "leading").tolist() == [750, 500, 250, 0]
    assert s.timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]


def test_vp_grid_preserves_variance_and_ends_clean():
    grid = s.vp_grid(s.linear_betas(), 10)
    assert grid.alpha**2 + grid.sigma**2 == pytest.approx(np.ones(11))
    assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0


def test_flow_shift_is_its_formula_and_shift_one_changes_nothing():
    u = np.linspace(1, 0, 6)
    assert s.flow_grid(5).sigma == pytest.approx(u)
    assert s.flow_grid(5, shift=3.0).sigma == pytest.approx(3 * u / (1 + 2 * u))
    assert s.flow_grid(5, shift=3.0, time_scale=1.0).t == pytest.approx((3 * u / (1 + 2 * u))[:-1])


def test_karras_levels():
    grid = s.karras_grid(18)
    assert grid.sigma[[0, 17, 18]] == pytest.approx([80, 0.002, 0])
    assert np.diff(grid.sigma[:-1] ** (1 / 7)) == pytest.approx(np.full(17, (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: s.flow_levels([1.0, 0.5, 0.5, 0.0]), "must fall at every step, found 0.5/0.5 then 0.5/0.5 at step 1"),
        (lambda: s.flow_levels([0.0, 0.5, 1.0]), "must fall"),
        (lambda: s.flow_levels([1.0, np.nan, 0.0]), "finite"),
        (lambda: s.flow_levels([1.0]), "T >= 1"),
        (lambda: s.vp_grid(np.array([0.1, 1.5]), 2), "inside"),
        (lambda: s.vp_grid(s.linear_betas(10), 11), "steps must lie in 1..10"),
        (lambda: s.timesteps(10, 2, "middle"), "unknown"),
        (lambda: s.karras_grid(1), "at least 2"),
    ],
)
def test_bad_schedules_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
