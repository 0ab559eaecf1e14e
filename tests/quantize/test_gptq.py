"""GPTQ against an independent float64 implementation, and where it must and must not differ from rounding to nearest."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import leaves_with_paths
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import compress
from jaxcomp.formats import Grid
from jaxcomp.formats.grid import fake_quantize, qparams
from jaxcomp.quantize import gptq, rtn

gptq_math = importlib.import_module("jaxcomp.quantize.gptq")  # the package's attribute of that name is the transform

N, K, T = 24, 144, 500
quantize_matrix = jax.jit(gptq_math.quantize_matrix, static_argnames=("act_order", "static_groups", "scale_dtype"))


def layer(seed=0, dead=()):
    """(w [N, K], x [T, K]) with correlated inputs, one of them large, some of them dead."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, K)) @ rng.normal(size=(K, K)) / 8 + rng.normal(size=(T, K))
    x[:, 7] *= 6
    x[:, list(dead)] = 0
    return rng.normal(size=(N, K)).astype(np.float32), x.astype(np.float32)


def hessian(x):
    return (2 / len(x) * x.T.astype(np.float64) @ x).astype(np.float32)


def reference_grid(w, grid):
    """Scale and zero point of each row of w, float64."""
    if grid.symmetric:
        half = (grid.count - 1) // 2
        scale, zero = np.abs(w).max(1) / half, np.full(len(w), grid.count // 2)
    else:
        high, low = np.maximum(w.max(1), 0), np.minimum(w.min(1), 0)
        scale = (high - low) / (grid.count - 1)
        zero = np.round(-low / scale)
    return np.where(scale > 0, scale, 1), zero


def reference_gptq(w, h, grid, act_order=False, static_groups=False):
    """Optimal brain quantization in a fixed order, with the inverse of what is left of H at every column, float64."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead], w[:, dead] = 1, 0
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    size = grid.group_size if grid.group_size > 0 else K
    grids = {start: reference_grid(w[:, start : start + size], grid) for start in range(0, K, size)}
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(K)
    codes, values, left = np.zeros((N, K)), np.zeros((N, K)), list(order)
    for j in order:
        start = j // size * size
        if j == start and grid.group_size > 0 and not static_groups:
            grids[start] = reference_grid(w[:, start : start + size], grid)
        scale, zero = grids[start]
        codes[:, j] = np.clip(np.round(w[:, j] / scale) + zero, 0, grid.count - 1)
        values[:, j] = (codes[:, j] - zero) * scale
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[:, left] -= np.outer((w[:, j] - values[:, j]) / inverse[0, 0], inverse[0])
        left.remove(j)
    return codes, values


def output_error(w, q, x):
    return np.linalg.norm(x.astype(np.float64) @ (np.asarray(w, np.float64) - np.asarray(q, np.float64)).T)


@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse(damp):
    h = hessian(layer()[1]).astype(np.float64)
    damped = h + damp * np.diag(h).mean() * np.eye(K)
    want = np.linalg.cholesky(np.linalg.inv(damped)).T
    found = gptq_math.inverse_factor(jnp.asarray(h, jnp.float32), damp)
    np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "grid, options",
    [
        (Grid(4), {}),
        (Grid(3, symmetric=False), {}),
        (Grid(3, levels=5), {"act_order": True}),
        (Grid(4, group_size=16), {}),
        (Grid(3, symmetric=False, group_size=48), {"static_groups": True}),
        (Grid(3, symmetric=False, group_size=16), {"act_order": True}),
    ],
    ids=str,
)
def test_codes_equal_an_independent_float64_implementation_and_beat_rounding(grid, options):
    w, x = layer(dead=(3, 90))
    static = options.get("static_groups", False) or options.get("act_order", False)
    codes, values = reference_gptq(w, hessian(x), grid, options.get("act_order", False), static)
    found, scale, zero = quantize_matrix(jnp.asarray(w), jnp.asarray(hessian(x)), grid, **options)
    per_column = lambda a: np.repeat(np.asarray(a), K // a.shape[1], axis=1)
    same = np.round(found / per_column(scale)) + per_column(zero) == codes
    assert same.mean() > 0.995
    assert abs(output_error(w, found, x) / output_error(w, values, x) - 1) < 0.01
    rounded = fake_quantize(jnp.asarray(w), *qparams(jnp.asarray(w), grid), grid)
    assert output_error(w, found, x) < 0.9 * output_error(w, rounded, x)


def test_per_tensor_grid_has_one_scale():
    w, x = layer()
    found, scale, _ = quantize_matrix(jnp.asarray(w), jnp.asarray(hessian(x)), Grid(4, group_size=-1))
    codes = np.asarray(found) / np.asarray(scale)
    assert scale.shape == (1, 1)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_uncorrelated_inputs_give_plain_rounding():
    w, _ = layer()
    h = jnp.diag(jnp.linspace(1, 5, K))
    found = quantize_matrix(jnp.asarray(w), h, Grid(4))[0]
    np.testing.assert_allclose(found, fake_quantize(w, *qparams(jnp.asarray(w), Grid(4)), Grid(4)), atol=1e-6)


def test_columns_of_dead_inputs_become_zero():
    w, x = layer(dead=(3, 90))
    found = quantize_matrix(jnp.asarray(w), jnp.asarray(hessian(x)), Grid(4))[0]
    assert not np.asarray(found)[:, [3, 90]].any() and np.asarray(found)[:, 4].any()


def test_stored_scales_are_the_scales_that_rounded(toy):
    packed = compress(gptq(4, scale_dtype="float16", sequential=False), toy.params, toy.data)[0]
    leaf = packed["blocks_0"]["attn"]["q"]["kernel"]
    assert leaf.scale.dtype == jnp.float16
    w = toy.params["blocks_0"]["attn"]["q"]["kernel"].T
    gram = toy.data(toy.params, {"gram", "count"})["blocks_0/attn/q/kernel"]
    values, _, _ = quantize_matrix(w, 2 * gram["gram"] / gram["count"], Grid(4), scale_dtype="float16")
    np.testing.assert_allclose(leaf.matrix(), values, atol=1e-6)


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=False, group_size=16)], ids=str)
def test_pruned_weights_stay_zero(grid):
    w, x = layer()
    w = np.where(np.random.default_rng(1).random(w.shape) < 0.5, w, 0).astype(np.float32)
    found = quantize_matrix(jnp.asarray(w), jnp.asarray(hessian(x)), grid)[0]
    rounded = fake_quantize(jnp.asarray(w), *qparams(jnp.asarray(w), grid), grid)
    assert not np.asarray(found)[w == 0].any()
    assert output_error(w, found, x) < 0.95 * output_error(w, rounded, x)


class Recorder(Calibration):
    """Calibration that remembers which params it was asked about, and which paths."""

    def __call__(self, params, needs, only=None):
        self.asked.append((params, {p for p in leaves_with_paths(params) if only(p)}))
        return super().__call__(params, needs, only)


@pytest.fixture
def recorder(toy):
    data = Recorder(toy.apply, toy.data.batches)
    data.asked = []
    return data


def test_statistics_come_from_the_compressed_prefix(toy, recorder):
    packed = leaves_with_paths(compress(gptq(3), toy.params, recorder)[0])
    assert len(recorder.asked) == 3  # blocks_0, blocks_1, head
    for stage, (params, observed) in enumerate(recorder.asked):
        assert observed == recorder.asked[0][1], "one compilation for all stages"
        for path, leaf in leaves_with_paths(params).items():
            done = path.endswith("kernel") and path < ("", "blocks_1", "head")[stage]
            np.testing.assert_array_equal(
                leaf, packed[path].materialise() if done else leaves_with_paths(toy.params)[path]
            )


def test_large_gram_matrices_are_taken_block_by_block(toy, recorder, monkeypatch):
    want = compress(gptq(3), toy.params, toy.data)[0]
    monkeypatch.setattr(gptq_math, "GRAM_BYTES", 1)
    found = compress(gptq(3), toy.params, recorder)[0]
    first = [sorted({p.split("/")[0] for p in observed}) for _, observed in recorder.asked]
    assert first == [["blocks_0"], ["blocks_1"], ["head"]]
    same = [jnp.mean(a == b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)]
    assert min(map(float, same)) > 0.95


def test_one_pass_without_sequential(toy, recorder):
    compress(gptq(3, sequential=False), toy.params, recorder)
    assert len(recorder.asked) == 1


def grouped(params, x):
    return jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


def test_without_a_gram_matrix_it_rounds_and_says_so():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 6))}
    data = Calibration(grouped, [jax.random.normal(jax.random.key(1), (2, 5, 5, 8))])
    with pytest.warns(UserWarning, match="kernel: no Gram matrix of its inputs; gptq rounds it to nearest"):
        found = compress(gptq(4), params, data)[0]
    jax.tree.map(np.testing.assert_array_equal, found, compress(rtn(4), params, data)[0])


def test_singular_hessian_is_an_error_that_names_the_leaf():
    params = {"kernel": jnp.eye(4)}
    data = Calibration(lambda p, x: x @ p["kernel"], [jnp.array([[2.0] * 4, [0.0] * 4])])  # H = 4 everywhere
    with pytest.raises(ValueError, match=r"kernel: the Hessian of its inputs is not positive definite with damp=0"):
        compress(gptq(4, damp=0.0), params, data)
    assert compress(gptq(4), params, data)[0]["kernel"].grid == Grid(4)


def test_convolution_kernels_have_a_gram_matrix():
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 6))}
    smooth = jax.image.resize(jax.random.normal(jax.random.key(1), (4, 3, 3, 4)), (4, 9, 9, 4), "cubic")
    data = Calibration(conv, [smooth])
    error = lambda t: jnp.linalg.norm(
        conv(params, smooth) - conv({"kernel": compress(t, params, data)[0]["kernel"].materialise()}, smooth)
    )
    options = dict(rules=(Rule("kernel"),))
    assert error(gptq(3, **options)) < 0.8 * error(rtn(3, **options))
