"""The sampling script: pictures, animation, caches, one-line errors."""

import types

import pytest
from PIL import Image

from experiments import sample, sample_caches
from jaxcomp.data.embedded_dit import FOLDER
from jaxcomp.evaluate.intervals import Interval
from jaxcomp.sampling.cache.pareto import Curve, Point

DEFAULTS = dict(
    classes=["3", "7"],
    rows=2,
    steps=6,
    solver="euler",
    guidance=1.5,
    cache="none",
    computed=0,
    seed=0,
    model="",
    bits=0,
    corrector="none",
    psnr=None,
    relative_error=None,
    report="",
)


def run(tmp_path, name="out.png", **changes):
    path = tmp_path / name
    sample.run(types.SimpleNamespace(**(DEFAULTS | changes), out=str(path)))
    return path


def test_png_shows_one_row_per_class(tmp_path, capsys):
    with Image.open(run(tmp_path)) as image:
        width, height = image.size
    assert width == height  # 2 x 2 samples
    assert "6 of 6 steps computed, hit rate 0%" in capsys.readouterr().out


def test_cache_and_gif_of_all_steps(tmp_path, capsys):
    with Image.open(run(tmp_path, "out.gif", cache="uniform")) as image:
        assert image.n_frames >= 6
    said = capsys.readouterr().out
    assert "3 of 6 steps computed, hit rate 50%" in said and "PSNR to the full run" in said


def test_a_budget_of_quality_takes_the_cheapest_plan_that_meets_it(monkeypatch, capsys):
    point = lambda n: Point(n, Interval(5.0 * n, 5.0 * n - 1, 5.0 * n + 1), Interval(0.1, 0.1, 0.1), n)
    monkeypatch.setattr(sample_caches, "pareto", lambda *_, **__: Curve(9, tuple(map(point, range(2, 9)))))
    monkeypatch.setattr(sample, "with_cache", lambda pipeline, config: config)
    draw = (sample.Pipeline(None, sample.make_solver("euler", 9)), None, None)
    args = types.SimpleNamespace(**(DEFAULTS | dict(cache="ertacache", steps=9, psnr=27.0)))
    assert sample.put_cache(args, draw, sample.Batch([])) == 6  # the lower end of 5 steps is 24 dB, that of 6 is 29
    assert "6 of 9 steps: PSNR 30.0 dB [29.0, 31.0]" in capsys.readouterr().out
    args.psnr, args.relative_error = None, 0.01
    with pytest.raises(ValueError, match=r"no plan reaches a relative error of 0\.01"):
        sample.put_cache(args, draw, sample.Batch([]))


def test_noise_predicting_model_with_a_stochastic_solver(tmp_path, capsys):
    run(tmp_path, solver="ddpm")
    assert "6 of 6" in capsys.readouterr().out


def test_quantized_model_with_a_corrector(tmp_path, capsys):
    psnr = lambda: float(capsys.readouterr().out.split("full run ")[1].split(" dB")[0])
    run(tmp_path, bits=4, classes=["0", "1", "2", "3"])
    plain = psnr()
    run(tmp_path, bits=4, corrector="tcec", classes=["0", "1", "2", "3"])
    assert psnr() > plain > 5


@pytest.mark.parametrize("name", ["fora", "taylorseer", "delta_dit", "adacache", "pab", "fastercache"])
def test_caches_that_need_no_calibration_go_on_the_pipeline(name):
    solver = sample.make_solver("euler", 6)
    draw = (sample.Pipeline(sample.network(sample.DiT(None)), solver), None, None)
    cached = sample.with_cache(draw[0], sample.CACHES[name](draw, 3))
    mask = cached.policy.plan(6)
    assert mask is None if name == "adacache" else mask[0] and len(mask) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(classes=["11"]), "digits 0 to 9"),
        (dict(classes=["x"]), "digits 0 to 9, found 'x'"),
        (dict(cache="fora", computed=7), "at most the 6 steps"),
        (dict(cache="pab", computed=3), "pab chooses its steps itself"),
        (dict(cache="none", computed=3), "every step runs without a cache"),
        (dict(model=str(FOLDER / "eps")), "predicts 'eps', use ddpm, ddim or dpmpp_2m"),
        (dict(cache="fora", psnr=30.0), "for --cache=ertacache"),
        (dict(cache="ertacache", computed=3, psnr=30.0), "expected one of --computed, --psnr"),
        (dict(corrector="tcec"), "give --bits"),
        (dict(solver="rk4"), "expected euler, ddpm, ddim, dpmpp_2m"),
        (dict(name="out.bmp"), r"\.png or \.gif"),
    ],
)
def test_bad_settings_are_explained_and_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: no such folder; experiments\.train_dit exports one"):
        sample.build(str(tmp_path / "none"), sample.make_solver("euler", 4), 1.0)
