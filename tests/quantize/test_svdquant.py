"""SVDQuant: what the branch buys, refinement, smoothing, packed leaves, bad input."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import materialise
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.formats import ActivationQuantizer, Grid, LowRankArray, QuantizedArray
from jaxcomp.formats.smoothed import SmoothedArray
from jaxcomp.io import orbax
from jaxcomp.quantize import rtn

svd = importlib.import_module("jaxcomp.quantize.svdquant")  # the package's name is the function
N, K = 12, 16
GRID, ACT = Grid(4, group_size=8), ActivationQuantizer(Grid(4))


def outlying(seed=0):
    """A weight whose large part has rank 2, and inputs with an outlying channel."""
    keys = jax.random.split(jax.random.key(seed), 4)
    low = jax.random.normal(keys[0], (N, 2)) @ jax.random.normal(keys[1], (2, K))
    w = low + 0.1 * jax.random.normal(keys[2], (N, K))
    x = jax.random.normal(keys[3], (512, K)).at[:, 3].multiply(20.0)
    return w, x


W, X = outlying()


def apply(params, x):
    return x @ params["a"]["kernel"]


PARAMS = {"a": {"kernel": W.T}}
STATS = Calibration(apply, [X[:256], X[256:]])


def error(params):
    out = jax.jit(compressed(apply))(params, X)
    return float(jnp.mean((out - X @ W.T) ** 2) / jnp.mean((X @ W.T) ** 2))


def quantized(transform, stats=STATS):
    return compress(transform, PARAMS, stats)[0]


OPTIONS = dict(act_bits=4, group_size=8)


def test_branch_and_smoothing_beat_plain_rounding():
    plain = error(quantized(rtn(4, **OPTIONS)))
    branch = error(quantized(svd.svdquant(4, rank=2, smooth=False, **OPTIONS)))
    smooth = error(quantized(svd.svdquant(4, rank=2, smooth=True, **OPTIONS)))
    assert smooth < 0.5 * branch < 0.25 * plain


def test_refinement_never_ends_above_the_plain_svd():
    rows = svd.surrogate_inputs(X.T @ X, jnp.float32(len(X)), jax.random.key(0))
    split = jax.jit(svd.split_matrix, static_argnums=(5, 6, 7))
    first, refined = (split(W, jnp.abs(X).max(0), rows, GRID, ACT, 2, turns, False) for turns in (0, 50))
    assert float(refined.error) <= float(first.error)
    np.testing.assert_allclose(refined.up @ refined.down + refined.rest, W, atol=1e-5)


def test_low_rank_is_the_truncated_svd():
    up, down = svd.low_rank(W, 3)
    s = np.linalg.svd(np.asarray(W), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(W - up @ down), np.sqrt((s[3:] ** 2).sum()), rtol=1e-4)


def test_surrogate_inputs_have_the_measured_moments():
    rows = svd.surrogate_inputs(X.T @ X, jnp.float32(len(X)), jax.random.key(1))
    np.testing.assert_allclose(jnp.square(rows).mean(0), jnp.square(X).mean(0), rtol=0.35)


def test_smoothing_candidates_move_outliers_into_the_weight():
    candidates = svd.smoothing_divisors(W, jnp.abs(X).max(0))
    np.testing.assert_array_equal(candidates[-1], jnp.ones(K))
    np.testing.assert_allclose(jnp.log(candidates).mean(1), 0, atol=1e-4)
    assert int(candidates[15].argmax()) == 3


def test_leaf_is_built_of_the_cores_leaves_and_packed():
    leaf = quantized(svd.svdquant(4, rank=2, **OPTIONS))["a"]["kernel"]
    assert isinstance(leaf, SmoothedArray) and isinstance(leaf.base, LowRankArray)
    assert isinstance(leaf.base.base, QuantizedArray) and leaf.base.base.act.grid.bits == 4
    assert leaf.base.base.packed.nbytes == N * K // 2
    bare = quantized(svd.svdquant(4, rank=2, smooth=False, **OPTIONS))["a"]["kernel"]
    assert isinstance(bare, LowRankArray)


def test_packed_product_is_the_formula():
    params = quantized(svd.svdquant(4, rank=2, **OPTIONS))
    leaf = params["a"]["kernel"]
    smooth = X / leaf.divisor[None]
    expected = smooth @ leaf.base.down.T @ leaf.base.up.T + ACT.fake(smooth) @ leaf.base.base.matrix().T
    np.testing.assert_allclose(jax.jit(compressed(apply))(params, X), expected, rtol=2e-4, atol=2e-4)
    seen = explain(apply, params, X)
    assert (
        seen.kernels("a/kernel")[0].startswith("smoothed+low_rank_matmul[r2]+int8_matmul[w4a4")
        and not seen.materialised
    )


def test_weight_of_the_leaf_is_near_the_original():
    leaf = quantized(svd.svdquant(4, rank=2, act_bits=None, group_size=8))["a"]["kernel"]
    assert float(jnp.abs(materialise(leaf) - W.T).max()) < 0.1 * float(jnp.abs(W).max())


def test_checkpoint_round_trip(tmp_path):
    params = quantized(svd.svdquant(4, rank=2, **OPTIONS))
    orbax.save(tmp_path / "a", params)
    again, _ = orbax.restore(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert isinstance(again["a"]["kernel"], SmoothedArray)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="calibration data"):
        quantized(svd.svdquant(4), None)
    with pytest.raises(ValueError, match="a/kernel: rank must be in 1"):
        quantized(svd.svdquant(4, rank=13, **OPTIONS))
    with pytest.raises(ValueError, match="matches no leaf"):
        quantized(svd.svdquant(4, rules=(Rule("b"),), **OPTIONS))
    leaf = quantized(svd.svdquant(4, rank=2, **OPTIONS))["a"]["kernel"]
    with pytest.raises(ValueError, match="divisor"):
        SmoothedArray.of(leaf.base, jnp.ones(K + 1))
