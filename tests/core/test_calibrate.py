"""Calibration statistics against numpy, through jit, scan, remat, convolution and shared leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.calibrate import Calibration, block_order
from jaxcomp.core.transform import compress
from jaxcomp.formats.observed import STATISTICS
from jaxcomp.quantize import rtn

BATCHES = [np.asarray(jax.random.normal(jax.random.key(i), (4, 6, 16)) + 0.1) for i in range(3)]


def numpy_statistics(x):
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return {
        "count": len(x),
        "sum": x.sum(0),
        "max_abs": np.abs(x).max(0),
        "max_value": x.max(0),
        "min_value": x.min(0),
        "sum_abs": np.abs(x).sum(0),
        "sum_sq": (x**2).sum(0),
        "gram": x.T @ x,
    }


def assert_statistics(got, x):
    for name, want in numpy_statistics(x).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_statistics_of_a_dense_layer():
    model = nn.Dense(8)
    params = model.init(jax.random.key(0), BATCHES[0])
    got = Calibration(model.apply, BATCHES)(params, STATISTICS)
    assert_statistics(got["params/kernel"], np.concatenate(BATCHES))


class Stack(nn.Module):
    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scan:
            return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="l")(
                x, None
            )[0]
        for i in range(3):
            x = layer(name=f"l_{i}")(x, None)[0]
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jax.jit(jnp.tanh)(nn.Dense(16, name="d")(x)), None


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_equals_the_loop(remat):
    scanned = Stack(scan=True, remat=remat)
    params = scanned.init(jax.random.key(0), BATCHES[0])["params"]
    loop = {f"l_{i}": jax.tree.map(lambda a, i=i: a[i], params["l"]) for i in range(3)}
    needs = ("max_abs", "gram", "count")
    run = lambda model: lambda p, x: model.apply({"params": p}, x)
    a = Calibration(run(scanned), BATCHES)(params, needs)["l/d/kernel"]
    b = Calibration(run(Stack(scan=False)), BATCHES)(loop, needs)
    for i in range(3):
        for name in needs:
            np.testing.assert_allclose(a[name][i], b[f"l_{i}/d/kernel"][name], rtol=1e-4, atol=1e-4)


def test_shared_leaf_adds_its_uses():
    apply = lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0] @ p["w"]
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)) / 4}
    inputs, x = [], BATCHES[0]
    for _ in range(3):
        inputs.append(x)
        x = np.tanh(x @ np.asarray(params["w"]))
    got = Calibration(apply, BATCHES[:1])(params, STATISTICS)["w"]
    assert_statistics(got, np.concatenate([*inputs, x]))


def test_cond_collects_the_branch_taken():
    apply = lambda p, x: jax.lax.cond(x.sum() > 0, lambda v: v @ p["w"], lambda v: 2 * v @ p["w"], x)
    params = {"w": jnp.eye(16)}
    for sign in (1, -1):
        batch = sign * np.abs(BATCHES[0])
        got = Calibration(apply, [batch])(params, ("max_abs",))["w"]["max_abs"]
        np.testing.assert_allclose(got, np.abs(batch).reshape(-1, 16).max(0) * (1 if sign > 0 else 2), rtol=1e-6)


def test_convolution_sees_its_patches():
    model = nn.Conv(4, (3, 3), strides=2, padding="VALID", use_bias=False)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 9, 9, 5)))
    params = model.init(jax.random.key(1), x)
    got = Calibration(model.apply, [x])(params, ("gram", "count"))["params/kernel"]
    rows = [x[b, i : i + 3, j : j + 3].reshape(-1) for b in range(2) for i in range(0, 7, 2) for j in range(0, 7, 2)]
    np.testing.assert_allclose(got["gram"], np.stack(rows).T @ np.stack(rows), rtol=1e-4, atol=1e-3)
    assert got["count"] == len(rows)


def test_statistics_follow_the_compressed_model():
    model = Stack(scan=False)
    params = model.init(jax.random.key(0), BATCHES[0])
    calibration = Calibration(model.apply, BATCHES)
    small, _, _ = compress(rtn(2), params, calibration)
    a, b = (calibration(p, ("sum_sq",)) for p in (params, small))
    first, last = "params/l_0/d/kernel", "params/l_2/d/kernel"
    np.testing.assert_allclose(a[first]["sum_sq"], b[first]["sum_sq"], rtol=1e-5)
    assert not np.allclose(a[last]["sum_sq"], b[last]["sum_sq"], rtol=1e-3)


def test_only_and_usage():
    model = Stack(scan=True)
    params = model.init(jax.random.key(0), BATCHES[0])
    calibration = Calibration(model.apply, BATCHES)
    assert calibration(params, ("sum",), only=lambda p: False) == {}
    use = calibration.usage(params)["params/l/d/kernel"]
    assert use.axes == (-2,) and use.batch_ndim == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        Calibration(lambda p, x: x, [])
    calibration = Calibration(lambda p, x: x @ p["w"], [np.full((2, 16), np.inf, np.float32)])
    with pytest.raises(ValueError, match="w: calibration statistic 'sum_sq' is not finite"):
        calibration({"w": jnp.eye(16)}, ("sum_sq",))
    with pytest.raises(ValueError, match="unknown statistics"):
        calibration({"w": jnp.eye(16)}, ("median",))
    twice = Calibration(lambda p, x: (x @ p["w"], x @ p["w"].T), [np.ones((2, 16), np.float32)])
    with pytest.raises(ValueError, match="exclude it by a rule"):
        twice.usage({"w": jnp.eye(16)})


def test_block_order_is_natural():
    paths = ["blocks_10/a", "blocks_2/a", "embed/e", "blocks_2/b"]
    assert block_order(paths) == [["blocks_2/a", "blocks_2/b"], ["blocks_10/a"], ["embed/e"]]
