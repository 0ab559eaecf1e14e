"""The cards of RLFN, DITN and the timings: small runs of the functions that make their rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ditn, rlfn, sr, sr_budget, sr_speed_card
from experiments.cards import Card, Row
from experiments.stages import Stages
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.throughput import Paired
from jaxcomp.io.files import CheckpointError
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.models.ditn import DITN
from jaxcomp.models.rlfn import RLFN
from jaxcomp.quantize import rtn


def test_ditn_forms_are_rewrites_of_each_other():
    found = ditn.forms(DITN(channels=8, inner_layers=1, spatial_layers=1), native=False)
    times, errors = ditn.measure(16, 2, found)
    assert errors.keys() == {"merged", "shifted"} and 0 < max(errors.values()) < 1e-5
    rows = {(row.method, row.metric): row for row in ditn.rows(16, times, errors, found)}
    macs = {name: rows[ditn.LABELS[name], "macs_G"].value for name in found}
    mixes = 4 * 8 * 8 * 16 * 16 / 1e9  # one 8 x 8 map per norm and pixel
    np.testing.assert_allclose([macs["tanh"] - macs["merged"], macs["merged"] - macs["layer"]], [mixes, 0], atol=1e-12)
    assert macs["shifted"] == macs["merged"]  # counted in the plain form
    assert rows[ditn.LABELS["tanh"], "speedup_vs_layernorm"].paper == 16 / 11


def test_depthwise_rows(monkeypatch):
    monkeypatch.setattr(ditn, "DEPTHWISE", {"patches": (3, 1, 4, 8), "dilated": (5, 2, 4, 0)})
    rows = ditn.depthwise_rows(16, 2)
    assert {row.metric for row in rows} == {"grouped_ms", "shifted_ms", "speedup_of_shifted"} and len(rows) == 6


def test_rlfn_rows_compare_with_float(monkeypatch, tmp_path):
    model = RLFN(8, 8, 1, 4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), param_shapes(model))
    monkeypatch.setattr(rlfn, "_CROP", 64)
    monkeypatch.setitem(rlfn.METHODS, "rtn_w8a8", rtn(4, rules=[Rule("blocks_0/conv_*/kernel")]))  # quick to compile
    monkeypatch.setattr(rlfn, "CALIBRATION", ("rocket",))
    high = rng.integers(0, 256, (80, 72, 3), np.uint8)
    pairs = [("noise", *sr.degrade(high, 4))]
    stats = rlfn.calibration(model)
    weights = tmp_path / "weights"
    weights.write_bytes(b"some")
    stages = Stages(tmp_path / "kept", rlfn.identity_of(weights, pairs))
    eight_bits = rlfn.kept(stages, "rtn_w8a8", lambda: rlfn.score("rtn_w8a8", model, params, stats, pairs))
    again = Stages(tmp_path / "kept", rlfn.identity_of(weights, pairs))
    assert rlfn.kept(again, "rtn_w8a8", lambda: pytest.fail("scored again")) == eight_bits
    weights.write_bytes(b"others")
    with pytest.raises(CheckpointError):
        Stages(tmp_path / "kept", rlfn.identity_of(weights, pairs))
    scored = {"float": rlfn.score("float", model, params, stats, pairs), "rtn_w8a8": eight_bits}
    rows = rlfn.rows(scored, sr.scores(lambda low: np.asarray(imresize(low, 4)), pairs, 4), 4)
    found = {(row.method, row.metric): row for row in rows}
    dense, eight = rlfn.LABELS["float"], rlfn.LABELS["rtn_w8a8"]
    lost = found[dense, "psnr_y"].value - found[eight, "psnr_y"].value
    assert found[eight, "lost_psnr_y"].value == pytest.approx(lost)
    assert found[eight, "weights_MB"].value < 0.8 * found[dense, "weights_MB"].value
    assert (dense, "lost_psnr_y") not in found and {("bicubic", "ssim_y"), (eight, "psnr_rgb")} <= found.keys()


def test_a_leaf_without_a_kernel_is_an_error():
    model = RLFN(8, 8, 1, 4)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), param_shapes(model))
    small, _, _ = compress(rtn(8, act_bits=8), params)
    rlfn.check_kernels(model, small)
    with pytest.raises(ArithmeticError, match="leaves without a kernel"):
        rlfn.check_kernels(model, small | {"spare": small["head"]})


def test_speed_compares_equal_networks_only():
    pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    import torch

    from experiments import sr_speed

    ours = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    theirs = torch.from_numpy(ours.transpose(0, 3, 1, 2).copy())
    functions = {"plain Flax": lambda: ours, sr_speed.BEST: lambda: ours, sr_speed.PEER: lambda: theirs}
    sr_speed.check(functions, "float32")
    with pytest.raises(
        ArithmeticError, match=r"C\+\+ convolutions, fused and PyTorch differ by 9.1e-02 of the span; nothing was timed"
    ):
        sr_speed.check(functions | {sr_speed.BEST: lambda: ours + 1}, "float32")


def test_speed_rows_are_ratios_to_the_peer():
    peer = {sr_speed_card.PEER: np.array([2.0, 2.0, 3.0])}
    best, hurried = (
        {sr_speed_card.BEST: np.array([1.0, 1.0, 3.0])} | peer,
        {sr_speed_card.BEST: np.array([4.0, 4.0, 3.0])} | peer,
    )
    times = [Paired(seconds, (0.5, 1.0), 2) for seconds in (best, hurried, {"plain Flax": np.full(3, 4.0)} | peer)]
    rows = sr_speed_card.rows("RLFN", (4, 6), "float32", *times)
    assert [(row.method, row.value) for row in rows if row.metric == "speedup_without_rest"] == [
        ("RLFN: C++ convolutions, fused", 0.5)
    ]
    assert {row.method: row.value for row in rows if row.metric == "runtime_ms"} == {
        "RLFN: plain Flax": 4000.0,
        "RLFN: C++ convolutions, fused": 1000.0,
        "RLFN: PyTorch": 2000.0,
    }
    ratios = {row.method: row.value for row in rows if row.metric == "speedup_vs_pytorch"}
    assert ratios == {"RLFN: plain Flax": 0.5, "RLFN: C++ convolutions, fused": 2.0}
    assert sr_speed_card.departures(rows, False)[0] == "JAX's best form is faster than PyTorch in every row."
    slow = [
        Row("RLFN: C++ convolutions, fused", "here", m, "", 0.5, 0.5, 0.5)
        for m in (sr_speed_card.SPEEDUP, sr_speed_card.HURRIED)
    ]
    assert sr_speed_card.departures(slow, True)[0] == (
        "Slower than PyTorch: RLFN: C++ convolutions, fused at here (speedup_vs_pytorch 0.50)."
    )


def test_sizes_are_height_by_width():
    pytest.importorskip("torch")
    from experiments import sr_speed

    assert sr_speed.parse_size("339x510") == (339, 510)


def test_median_interval():
    median, low, high = sr.median_interval(np.arange(1.0, 102.0))
    assert 35 < low < 51 == median < high < 67
    assert sr.median_interval(np.full(5, 3.0)) == (3.0, 3.0, 3.0)


def test_rows_of_another_card_say_where_they_are_from(tmp_path):
    rows = [Row("a", "here", "kept", "", 1.0, 1.0, 1.0, note="words"), Row("a", "here", "dropped", "", 2.0, 2.0, 2.0)]
    Card("other", "paper", "command", "abc", "cpu", 0.1, [0], rows).write(tmp_path)
    (row,) = sr.cited_rows(tmp_path, "other", lambda row: row.metric == "kept")
    assert row.value == 1.0 and row.note == "words; from the card other, commit abc"
    assert sr.cited_rows(tmp_path, "missing", lambda row: True) == []


def test_bootstrap_covers_seeds_and_images():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 1.0, (1, 5))
    mean, low, high = sr_budget.bootstrap(values)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert high - low > 1.5 * values.std(axis=1).mean() / 5**0.5
    assert sr_budget.bootstrap(np.full((2, 4), 3.0)) == (3.0, 3.0, 3.0)
    over_seeds = sr_budget.bootstrap(np.array([[0.0], [1.0], [2.0]]))
    assert over_seeds[1] < 0.5 and over_seeds[2] > 1.5


def test_budget_rows_are_paired_differences():
    scores = lambda psnr: {"psnr_y": np.array(psnr), "ssim_y": np.array(psnr) / 100}
    bicubic = scores([[28.0, 30.0]])
    rows = sr_budget.rows({"rlfn": scores([[29.0, 31.0]]), "imdn": scores([[28.5, 30.5]])}, bicubic, "set5 x4")
    found = {(row.method, row.metric): (row.value, row.low, row.high) for row in rows}
    assert found["RLFN, tiny", "gain_over_bicubic"] == (1.0, 1.0, 1.0)
    assert found["RLFN, tiny", "psnr_y minus that of IMDN, tiny"] == (0.5, 0.5, 0.5)
    assert found["bicubic", "psnr_y"] == (29.0, 28.0, 30.0) and ("DITN, tiny", "psnr_y") not in found
