"""The cards of RLFN, DITN and the timings: small runs of the functions that make their rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ditn, rlfn, sr
from experiments.cards import Row
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.evaluate.throughput import Paired
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.models.ditn import DITN, merge_norm, substitute_norm
from jaxcomp.models.rlfn import RLFN
from jaxcomp.quantize import rtn


def test_ditn_forms_are_rewrites_of_each_other():
    small = DITN(channels=8, inner_layers=1, spatial_layers=1)
    layer = jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    tanh = ditn.spread(substitute_norm(layer), 0)
    models = {
        "layer": (small, layer),
        "tanh": (small.clone(norm="tanh"), tanh),
        "merged": (small.clone(norm="merged"), merge_norm(tanh)),
    }
    times, error = ditn.measure(16, 2, models)
    assert 0 < error < 1e-5
    found = {(row.method, row.metric): row for row in ditn.rows(16, times, error, models)}
    macs = {name: found[label, "MACs"].value for name, label in ditn.LABELS.items()}
    mixes = 4 * 8 * 8 * 16 * 16 / 1e9  # one 8 x 8 map per norm and pixel
    np.testing.assert_allclose([macs["tanh"] - macs["merged"], macs["merged"] - macs["layer"]], [mixes, 0], atol=1e-12)
    assert found[ditn.LABELS["tanh"], "speedup over LayerNorm"].paper == 16 / 11


def test_rlfn_rows_compare_with_float(monkeypatch):
    model = RLFN(8, 8, 1, 4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), param_shapes(model))
    monkeypatch.setattr(rlfn, "_CROP", 64)
    monkeypatch.setitem(rlfn.METHODS, "rtn_w8a8", rtn(4, rules=[Rule("blocks_0/conv_*/kernel")]))  # quick to compile
    monkeypatch.setattr(rlfn, "CALIBRATION", ("rocket",))
    high = rng.integers(0, 256, (80, 72, 3), np.uint8)
    rows = rlfn.score_all(model, params, [("noise", *sr.degrade(high, 4))], ["rtn_w8a8"])
    found = {(row.method, row.metric): row for row in rows}
    dense, eight = rlfn.LABELS["float"], rlfn.LABELS["rtn_w8a8"]
    lost = found[dense, "PSNR-Y"].value - found[eight, "PSNR-Y"].value
    assert found[eight, "PSNR-Y lost to float"].value == pytest.approx(lost)
    assert found[eight, "weights"].value < 0.8 * found[dense, "weights"].value
    assert (dense, "PSNR-Y lost to float") not in found and ("bicubic", "SSIM-Y") in found


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
    sr_speed.check({"JAX": lambda: ours, "PyTorch": lambda: theirs}, "float32")
    with pytest.raises(ArithmeticError, match=r"differ by 9.1e-02 of the span; nothing was timed"):
        sr_speed.check({"JAX": lambda: ours + 1, "PyTorch": lambda: theirs}, "float32")
    seconds = {"JAX": np.array([1.0, 1.0, 3.0]), "PyTorch": np.array([2.0, 2.0, 3.0])}
    rows = sr_speed.rows("RLFN", (4, 6), "float32", Paired(seconds, (0.5, 1.0), 2))
    assert {row.metric: row.value for row in rows} == {
        "time, JAX": 1000.0,
        "time, PyTorch": 2000.0,
        "speedup over PyTorch": 2.0,
    }
    assert sr_speed.departures(rows)[0] == "JAX is faster in every row."
    slow = [Row("RLFN", "here", "speedup over PyTorch", "", 0.5, 0.5, 0.5)]
    assert sr_speed.departures(slow)[0] == "JAX is slower than PyTorch for RLFN at here."


def test_sizes_are_height_by_width():
    pytest.importorskip("torch")
    from experiments import sr_speed

    assert sr_speed.parse_size("339x510") == (339, 510)
