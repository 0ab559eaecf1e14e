"""`QuantizedArray`: exact bytes, views, integer products, memory, errors, taking apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import leaf_class, nbytes
from jaxcomp.formats import (
    ActivationQuantizer,
    FakeQuantizedArray,
    Grid,
    Layout,
    LowRankArray,
    MaskedArray,
    QuantizedArray,
)

W = jax.random.normal(jax.random.key(0), (64, 48))
X = jax.random.normal(jax.random.key(1), (5, 64))


def quantized(w=W, axes=(0,), act=None, scale_dtype="float32", **grid):
    return QuantizedArray.quantize(w, Grid(**{"bits": 4, **grid}), axes, act, scale_dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_exact(bits, group, symmetric):
    leaf = quantized(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float16")
    scales = {0: 48, 32: 96, -1: 1}[group]
    assert leaf.nbytes == nbytes(leaf) == 48 * 64 * bits // 8 + scales * (2 if symmetric else 3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step(bits):
    leaf = quantized(bits=bits)
    assert (jnp.abs(leaf.materialise() - W) <= leaf.scale[:, 0][None] / 2 + 1e-6).all()


def test_one_bit():
    leaf = quantized(bits=1, symmetric=False)
    assert leaf.codes().max() == 1 and leaf.packed.shape == (48, 2)
    np.testing.assert_allclose(compressed(jnp.matmul)(X, leaf), X @ leaf.materialise(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w_symmetric", [True, False])
@pytest.mark.parametrize("x_symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, -1])
@pytest.mark.parametrize("bits,act_bits", [(2, 8), (4, 4), (8, 8), (3, 6)])
def test_integer_product_equals_dequantized_product(w_symmetric, x_symmetric, group, bits, act_bits):
    act = ActivationQuantizer(Grid(act_bits, symmetric=x_symmetric))
    leaf = quantized(bits=bits, group_size=group, symmetric=w_symmetric, act=act)
    got = jax.jit(compressed(jnp.matmul))(X, leaf)
    np.testing.assert_allclose(got, act.fake(X) @ leaf.materialise(), rtol=1e-4, atol=2e-5)


def test_large_codes_do_not_overflow():
    k = 8192
    act = ActivationQuantizer(Grid(8, symmetric=False))
    leaf = quantized(jnp.abs(jax.random.normal(jax.random.key(2), (k, 4))) + 1, bits=8, symmetric=False, act=act)
    x = jnp.abs(jax.random.normal(jax.random.key(3), (2, k))) + 1
    want = np.asarray(act.fake(x), np.float64) @ np.asarray(leaf.materialise(), np.float64)
    np.testing.assert_allclose(compressed(jnp.matmul)(x, leaf), want, rtol=2e-6)


def test_static_activation_quantization():
    act = ActivationQuantizer(Grid(8), scale=jnp.float32(0.05))
    leaf = quantized(act=act)
    want = (jnp.clip(jnp.round(X / 0.05), -128, 127) * 0.05) @ leaf.materialise()
    np.testing.assert_allclose(compressed(jnp.matmul)(X, leaf), want, rtol=1e-4, atol=1e-4)


VIEWS = {
    "transpose": lambda w, x: x @ w.T.T,
    "reshape rows": lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(64, 6, 8)),
    "reshape columns": lambda w, x: jnp.einsum("bij,ijn->bn", x.reshape(-1, 8, 8), w.reshape(8, 8, 48)),
    "expand and squeeze": lambda w, x: x @ w[None][0],
    "astype": lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
    "leaf on the left": lambda w, x: (w.T @ x.T).T,
    "slice of rows": lambda w, x: x @ w.T[4:20].T,
    "dynamic slice of rows": lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w.T, 8, 16).T,
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_do_not_materialise(name):
    leaf = quantized()
    fn = VIEWS[name]
    assert not explain(fn, leaf, X).materialised
    got, want = jax.jit(compressed(fn))(leaf, X), fn(leaf.materialise(), X)
    np.testing.assert_allclose(
        got, want, rtol=2e-2 if name == "astype" else 1e-4, atol=0.2 if name == "astype" else 1e-4
    )


def test_what_has_no_rule_is_materialised_and_said():
    seen = explain(lambda w, x: x @ jnp.sin(w), quantized(), X)
    assert [e.primitive for e in seen.materialised] == ["sin"]
    assert "materialised" in str(seen)


def test_contraction_over_rows_is_materialised():
    seen = explain(lambda w, y: y @ w.T, quantized(), jnp.ones((3, 48)))
    assert [e.primitive for e in seen.materialised] == ["dot_general"]


@pytest.mark.parametrize("group", [0, 32, -1])
def test_table_lookup_reads_rows(group):
    table = quantized(W.T, axes=(1,), group_size=group)
    ids = jnp.array([[0, 5], [47, 2]])
    take = lambda t, i: jnp.take(t, i, axis=0)
    np.testing.assert_allclose(jax.jit(compressed(take))(table, ids), take(table.materialise(), ids), atol=1e-6)
    assert explain(take, table, ids).kernels("") == ("take_rows[w4]",)
    assert np.isnan(compressed(take)(table, jnp.array([48]))).all()


def test_batched_product():
    w = jax.random.normal(jax.random.key(4), (3, 64, 48))
    leaf = jax.vmap(lambda a: quantized(a))(w)
    x = jax.random.normal(jax.random.key(5), (3, 7, 64))
    for equation in ("bmk,bkn->bmn", "bmk,bkn->mbn"):
        fn = lambda w, x, e=equation: jnp.einsum(e, x, w)
        assert not explain(fn, leaf, x).materialised
        np.testing.assert_allclose(compressed(fn)(leaf, x), fn(leaf.materialise(), x), rtol=1e-4, atol=1e-4)


def test_scale_receives_gradients():
    leaf = quantized()
    loss = lambda s: compressed(jnp.matmul)(X, QuantizedArray(leaf.packed, s, None, None, leaf.layout, leaf.grid)).sum()
    grad = jax.grad(loss)(leaf.scale)
    want = (leaf.codes().astype(jnp.float32) - 8) @ X.sum(0)[:, None]
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [128, 1024])
def test_peak_memory_stays_below_one_layer(n):
    layers = 6
    leaf = quantized(jax.random.normal(jax.random.key(6), (n, n)))
    tree = [leaf] * layers

    def model(tree, x):
        for w in tree:
            x = jnp.tanh(x @ w)
        return x

    x = jnp.ones((2, n))
    used = jax.jit(compressed(model)).lower(tree, x).compile().memory_analysis().temp_size_in_bytes
    assert used < n * n * 4, f"{used} bytes: {layers} layers of {n * n * 4} bytes were expanded at once"


def test_wide_layers_are_decoded_in_blocks():
    n = 2048
    leaf = jax.eval_shape(lambda: quantized(jnp.zeros((n, n))))
    used = jax.jit(compressed(jnp.matmul)).lower(jnp.ones((2, n)), leaf).compile().memory_analysis().temp_size_in_bytes
    assert used < n * n * 4, f"{used} bytes: the whole weight was expanded"


PARTS = {
    "quantized": lambda: quantized(symmetric=False, group_size=32, act=ActivationQuantizer(Grid(8), jnp.float32(0.1))),
    "fake_quantized": lambda: FakeQuantizedArray.of(W, Grid(3, 5), (0,)),
    "masked": lambda: MaskedArray.of(W, jnp.arange(48 * 8).reshape(48, 8) % 2 == 0, (0,), 8),
    "low_rank": lambda: LowRankArray.of(quantized(), 2, jax.random.key(7)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_round_trip(kind):
    import json

    leaf = PARTS[kind]()
    statics = json.loads(json.dumps(leaf.statics()))
    again = leaf_class(kind).from_parts(leaf.components(), statics)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(again.materialise(), leaf.materialise())


def test_contradicting_parts_are_refused():
    leaf = quantized()
    parts, statics = leaf.components(), leaf.statics()
    with pytest.raises(ValueError, match="packed: expected"):
        QuantizedArray.from_parts({**parts, "packed": parts["packed"][:, 1:]}, statics)
    with pytest.raises(ValueError, match="scale: expected"):
        QuantizedArray.from_parts({**parts, "scale": parts["scale"][1:]}, statics)
    with pytest.raises(ValueError, match="unknown fields"):
        QuantizedArray.from_parts({**parts, "surprise": parts["scale"]}, statics)
    with pytest.raises(ValueError, match="zero_point"):
        QuantizedArray(leaf.packed, leaf.scale, jnp.zeros((48, 1), jnp.uint8), None, leaf.layout, leaf.grid)
    with pytest.raises(ValueError, match="does not order"):
        Layout((2,), (3,), (0, 2))


def test_low_rank_starts_at_its_base_and_trains_only_the_update():
    leaf = LowRankArray.of(quantized(), 4, jax.random.key(8))
    np.testing.assert_allclose(compressed(jnp.matmul)(X, leaf), X @ quantized().materialise(), rtol=1e-4, atol=1e-4)
    grads = jax.grad(lambda w: (compressed(jnp.matmul)(X, w) ** 2).sum(), allow_int=True)(leaf)
    assert float(jnp.abs(grads.up).max()) > 0 and float(jnp.abs(grads.base.scale).max()) == 0
    with pytest.raises(ValueError, match=r"1\.\.48"):
        LowRankArray.of(W, 49, jax.random.key(0), (0,))


def test_masked_weights_get_no_gradient():
    leaf = MaskedArray.of(W, jnp.arange(48 * 8).reshape(48, 8) % 2 == 0, (0,), 8)
    grads = jax.grad(lambda w: compressed(jnp.matmul)(X, w).sum(), allow_int=True)(leaf)
    dropped = ~jnp.repeat(leaf.keep(), 8, -1)
    assert float(jnp.abs(jnp.where(dropped, grads.value, 0)).max()) == 0
    assert float(leaf.density) == 0.5 and leaf.mask.nbytes == 48 * 4
