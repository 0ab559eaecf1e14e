"""The same layer through qwix's GPTQ, AWQ and SmoothQuant: other code, other grids, comparable results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.formats import Grid
from jaxcomp.formats.grid import fake_quantize, qparams
from jaxcomp.quantize.awq import search_scale
from jaxcomp.quantize.gptq import quantize_matrix
from jaxcomp.quantize.smoothquant import smoothing_scale

pytest.importorskip("qwix")
from qwix._src.core import qarray
from qwix.contrib import awq_core, gptq_core, smooth_quant

N, K, T = 32, 128, 600
QTYPES = {4: jnp.int4, 8: jnp.int8}


@pytest.fixture(autouse=True)
def promotion():
    """qwix relies on implicit promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def layer(correlation=0.1, spread=1.0):
    """(w [N, K], x [T, K]) of Gaussian channels with unequal sizes."""
    rng = np.random.default_rng(5)
    x = (
        rng.normal(size=(T, K))
        @ (np.eye(K) + correlation * rng.normal(size=(K, K)))
        * np.exp(spread * rng.normal(size=K))
    )
    return jnp.asarray(rng.normal(size=(N, K)), jnp.float32), jnp.asarray(x, jnp.float32)


def how(bits, group_size, method):
    tiles = {1: group_size} if group_size else {}
    return qarray.HowToQuantize(qtype=QTYPES[bits], channelwise_axes=(0,), tiled_axes=tiles, calibration_method=method)


def output_error(w, q, x):
    return float(jnp.linalg.norm(x @ (w - q).T))


@pytest.mark.parametrize("bits, group_size", [(4, 0), (8, 0), (4, 16)])
def test_gptq_gives_the_same_codes_on_the_same_grid(bits, group_size):
    """qwix divides max|w| by 2^(b-1) - 1/2, we by 2^(b-1) - 1; `absmax,factor` makes its scale ours."""
    w, x = (a[:, :32] for a in layer())
    qmax = 2 ** (bits - 1) - 1
    found, _, _ = quantize_matrix(w, x.T @ x, Grid(bits, group_size=group_size))
    method = f"absmax,{(qmax + 0.5) / qmax}"
    quantize = lambda w, h: gptq_core.quantize_weight(w, h, how(bits, group_size, method), blocksize=group_size or 32)
    theirs = qarray.dequantize(jax.jit(quantize)(w, x.T @ x)[0])
    assert float(jnp.mean(jnp.isclose(found, theirs, atol=1e-4))) > 0.995
    assert output_error(w, found, x) == pytest.approx(output_error(w, theirs, x), rel=0.01)


@pytest.mark.parametrize("bits, group_size", [(4, 0), (8, 0), (4, 32)])
def test_awq_chooses_like_qwix_where_the_objectives_agree(bits, group_size):
    """Independent Gaussian channels: our ||X D^T||^2 is proportional to qwix's sum of (D_nj mean|X_j|)^2."""
    w, x = layer(correlation=0.0)
    mean_abs = jnp.abs(x).mean(0)
    grid = Grid(bits, symmetric=False, group_size=group_size)
    scale, rho = search_scale([w], [grid], mean_abs, jnp.diag(jnp.pi / 2 * T * mean_abs**2))
    theirs = awq_core.search_optimal_scales(w, mean_abs, how(bits, group_size, "minmax"))[0]
    their_rho = np.polyfit(np.log(mean_abs), np.log(theirs), 1)[0]
    assert abs(float(rho) - their_rho) < 0.16  # three steps of 1/20 and 1/19; the minimum is flat
    restored = lambda s: fake_quantize(w * s[None], *qparams(w * s[None], grid), grid) / s[None]
    ours, other = (jnp.linalg.norm((w - restored(s)) * mean_abs[None]) for s in (scale, theirs))
    assert float(ours) == pytest.approx(float(other), rel=0.05)


def test_awq_is_not_worse_where_channels_are_correlated():
    w, x = layer()
    grid, mean_abs = how(4, 32, "minmax"), jnp.abs(x).mean(0)
    restored = lambda s: qarray.dequantize(qarray.quantize(w * s[None], grid)) / s[None]
    ours = search_scale([w], [Grid(4, symmetric=False, group_size=32)], mean_abs, x.T @ x)[0]
    theirs = awq_core.search_optimal_scales(w, mean_abs, grid)[0]
    assert output_error(w, restored(ours), x) <= output_error(w, restored(theirs), x) * 1.01


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothquant_scale_is_the_same_for_one_consumer(alpha):
    w, x = layer()
    max_abs, w_max = jnp.abs(x).max(0), jnp.abs(w).max(0)
    theirs = smooth_quant.compute_scales_ratio(max_abs, w_max, alpha=alpha)
    np.testing.assert_allclose(smoothing_scale(max_abs, [w], alpha), theirs, rtol=1e-5)
