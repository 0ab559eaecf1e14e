"""Budgeted calibration: the curve, the plan that a budget asks for, and the report."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import toy_sampler as toy

from jaxcomp.evaluate.intervals import Interval
from jaxcomp.sampling.cache import figures
from jaxcomp.sampling.cache.ertacache import ErtaSettings
from jaxcomp.sampling.cache.pareto import Batch, Curve, Point, choose, measure, pareto
from jaxcomp.sampling.cache.quality import mean_interval, quality
from jaxcomp.sampling.cache.uniform import UniformCacheConfig
from jaxcomp.sampling.pipeline import Pipeline, with_cache

PARAMS = toy.init()
PIPELINE = Pipeline(toy.denoiser, toy.flow(8))
CALIBRATION, EVALUATION = (Batch(toy.noise(4, key), toy.LABELS) for key in (1, 2))
SETTINGS = ErtaSettings(computed=1, window=3)


@pytest.fixture(scope="module")
def curve():
    return pareto(PIPELINE, PARAMS, CALIBRATION, EVALUATION, settings=SETTINGS, computed=(4, 6, 8))


def test_curve_has_the_plans_and_their_true_quality(curve):
    assert [point.computed for point in curve.points] == [4, 6, 8]
    full = np.asarray(jax.jit(PIPELINE)(PARAMS, *EVALUATION)[0])
    for point in curve.points:
        x, trace = jax.jit(with_cache(PIPELINE, point.config))(PARAMS, *EVALUATION)
        assert int(trace.nfe) == point.computed
        if point.computed < 8:
            assert point.psnr.value == pytest.approx(quality(x, full).psnr.mean(), abs=0.01)
        assert point.psnr.low <= point.psnr.value <= point.psnr.high
    assert curve.points[-1].relative_error.value < 1e-5 < curve.points[0].relative_error.value
    assert curve.profile.ratio_of_sums.shape == (8, 3)


def test_default_numbers_are_all_that_the_window_allows():
    found = pareto(
        PIPELINE, PARAMS, CALIBRATION, EVALUATION, settings=dataclasses.replace(SETTINGS, rectify="off", phi="off")
    )
    assert [point.computed for point in found.points] == list(range(3, 9))


def test_measure_takes_any_cache(curve):
    found = measure(
        PIPELINE, {4: UniformCacheConfig(computed=4), 2: UniformCacheConfig(computed=2)}, PARAMS, EVALUATION
    )
    assert [point.computed for point in found.points] == [2, 4]
    assert found.points[0].psnr.value < found.points[1].psnr.value


def points(*rows):
    make = lambda n, low: Point(n, Interval(low + 1, low, low + 2), Interval(1 / n, 0.5 / n, 2 / n), None)
    return Curve(30, tuple(make(n, low) for n, low in rows))


def test_budgets():
    curve = points((5, 20.0), (10, 30.0), (15, 29.0), (20, 40.0))
    assert choose(curve, psnr=30.0).computed == 10 and choose(curve, psnr=31.0).computed == 20
    assert choose(curve, relative_error=0.15).computed == 15
    assert choose(curve, computed=19).computed == 10 and choose(curve, computed=5).computed == 5
    for budget, message in (
        (dict(psnr=41.0), "best lower bound is 40.0 dB"),
        (dict(relative_error=0.01), "best upper bound is 0.1"),
        (dict(computed=4), "the fewest are 5"),
        (dict(), "exactly one budget"),
        (dict(psnr=1.0, computed=5), "exactly one budget"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(curve, **budget)


def test_shared_noises_are_refused():
    with pytest.raises(ValueError, match="share 4 noises"):
        pareto(PIPELINE, PARAMS, CALIBRATION, CALIBRATION, settings=SETTINGS, computed=(4,))


def test_quality_is_its_definition():
    full = np.full((2, 4), 0.5)
    x = full + np.array([[0.1], [0.2]])
    found = quality(x, full)
    assert found.psnr == pytest.approx([10 * np.log10(4 / 0.01), 10 * np.log10(4 / 0.04)])
    assert found.relative_error == pytest.approx([0.2, 0.4])
    with pytest.raises(ValueError, match="diverged"):
        quality(np.full((1, 2), np.nan), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="same shape"):
        quality(np.zeros((1, 2)), np.zeros((2, 2)))


def test_interval_covers_seeds_and_samples():
    rng = np.random.default_rng(0)
    values = 3 + rng.standard_normal((3, 400))
    found = mean_interval(values)
    assert found.low < 3 < found.high and 0.02 < found.high - found.low < 0.6
    apart = mean_interval(np.repeat([[0.0], [10.0]], 5, 1))
    assert (apart.low, apart.value, apart.high) == (0, 5, 10)


def test_report(curve, tmp_path):
    chosen = choose(curve, computed=6)
    drawings = [figures.draw_profile(curve.profile), figures.draw_plans({"a": chosen.config.plan.mask})]
    drawings.append(figures.draw_curves({"ERTA <b>": curve}, chosen))
    figures.write_report(tmp_path / "out" / "report.html", "Caching", {"ERTA <b>": curve}, drawings, chosen)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "ERTA &lt;b&gt;" in page and page.count("class=chosen") == 1
    figures.write_report(tmp_path / "report.png", "Caching", {"ERTA": curve}, drawings)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.html or \.png"):
        figures.write_report(tmp_path / "report.pdf", "Caching", {"ERTA": curve}, drawings)
    assert sorted(p.name for p in pathlib.Path(tmp_path).iterdir()) == ["out", "report.png"]
