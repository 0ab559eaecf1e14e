"""Layouts of the codes of a quantized leaf: exact bytes, the same values and products, refusals, kernels that read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import leaf_class, nbytes
from jaxcomp.core.transform import chain, compress
from jaxcomp.deploy import kernel_layouts
from jaxcomp.formats import ActivationQuantizer, Grid, QuantizedArray, storage
from jaxcomp.io import orbax
from jaxcomp.quantize import rtn

W = jax.random.normal(jax.random.key(0), (256, 96))
X = jax.random.normal(jax.random.key(1), (3, 256))
FIVE = dict(bits=3, levels=5)


def quantized(w=W, act_bits=8, bits=4, **grid):
    act = ActivationQuantizer(Grid(act_bits)) if act_bits else None
    return QuantizedArray.quantize(w, Grid(bits, **grid), (0,), act)


@pytest.mark.parametrize("layout", storage.STORAGES)
@pytest.mark.parametrize("act_bits", [0, 8])
def test_values_and_products_stay(layout, act_bits):
    leaf = quantized(act_bits=act_bits, **(FIVE if layout == "base5" else {}))
    other = leaf.stored_as(layout)
    np.testing.assert_array_equal(other.codes(), leaf.codes())
    run = jax.jit(compressed(jnp.matmul))
    np.testing.assert_allclose(run(X, other), run(X, leaf), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(other.stored_as("dense").packed, leaf.packed)


def test_five_levels_take_seven_thirds_of_a_bit():
    dense = quantized(jax.random.normal(jax.random.key(2), (384, 64)), **FIVE)
    packed = dense.stored_as("base5").packed.nbytes
    assert dense.packed.nbytes == 64 * 384 * 3 // 8 and packed == 64 * (384 // 3) * 7 // 8


def test_stacked_layers_are_laid_out_one_by_one():
    leaves = [quantized(W + i) for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *leaves)
    other = stacked.stored_as("kn_int8")
    assert other.shape == (2, 256, 96) and other.batch_shape == (2,)
    run = jax.jit(lambda x, w: jax.lax.scan(lambda _, layer: (None, compressed(jnp.matmul)(x, layer)), None, w)[1])
    np.testing.assert_allclose(run(X, other)[1], compressed(jnp.matmul)(X, leaves[1]), rtol=2e-5, atol=2e-5)


def test_gradients_of_scales_do_not_depend_on_the_layout():
    loss = lambda scale, leaf: compressed(jnp.matmul)(X, dataclasses.replace(leaf, scale=scale)).sum()
    leaf = quantized(act_bits=0)
    want, found = (jax.jit(jax.grad(loss))(leaf.scale, stored) for stored in (leaf, leaf.stored_as("kn_int8")))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6 * float(jnp.abs(want).max()))  # other order of sums


@pytest.mark.parametrize(
    "layout, grid, message",
    [
        ("base5", dict(bits=3), "holds five levels, the grid has 8"),
        ("kn_int4", dict(bits=5), "holds at most 4 bits, the grid has 5"),
        ("base3", dict(bits=4), "storage 'base3' is unknown; known are dense, bytes, base5"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout, grid, message):
    with pytest.raises(ValueError, match=message):
        quantized(**grid).stored_as(layout)


def test_arrays_of_another_layout_are_refused():
    leaf = quantized(**FIVE)
    with pytest.raises(ValueError, match=r"packed: expected uint32 \[\.\.\., 96, 19\], found uint32 \(96, 24\)"):
        dataclasses.replace(leaf, storage="base5")


def test_base5_survives_a_checkpoint_and_shrinks_it(tmp_path):
    tree = {"dense": {"kernel": quantized(**FIVE)}}
    laid_out, _, _ = compress(kernel_layouts("cpu_ffi"), tree)
    assert laid_out["dense"]["kernel"].storage == "base5"
    orbax.save(tmp_path / "a", laid_out)
    back = orbax.restore(tmp_path / "a")[0]
    assert back["dense"]["kernel"].storage == "base5" and nbytes(back) == nbytes(laid_out) < nbytes(tree)
    np.testing.assert_array_equal(back["dense"]["kernel"].codes(), tree["dense"]["kernel"].codes())


def test_leaves_without_a_storage_are_dense():
    """As in checkpoints that were written before there was another."""
    leaf = quantized()
    statics = {name: value for name, value in leaf.statics().items() if name != "storage"}
    assert leaf_class("quantized").from_parts(leaf.components(), statics).storage == "dense"


def test_accelerator_kernels_run_leaves_in_their_layouts():
    tree = {"dense": {"kernel": W}, "embed": {"embedding": W}}
    laid_out, _, _ = compress(chain(rtn(4, act_bits=8), kernel_layouts("tpu")), tree)
    leaf = laid_out["dense"]["kernel"]
    assert leaf.storage == "kn_int4"
    lower = lambda w: jax.jit(compressed(jnp.matmul)).trace(X, w).lower(lowering_platforms=("tpu",)).as_text()
    one_device = pytest.MonkeyPatch()
    with one_device.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        assert "tpu_custom_call" in lower(leaf) and "tpu_custom_call" not in lower(leaf.stored_as("dense"))
    assert explain(lambda p, x: x @ p, leaf, X).kernels("") == ("int8_matmul[w4a8,kn_int4]@xla",)


def test_what_a_kernel_does_not_cover_stays():
    tree = {"small_groups": {"kernel": quantized(group_size=64)}, "plain": {"kernel": W}}
    laid_out, _, _ = compress(kernel_layouts("tpu"), tree)
    assert laid_out["small_groups"]["kernel"].storage == "dense" and laid_out["plain"]["kernel"] is W


def test_tables_stay_where_rows_are_looked_up():
    table = QuantizedArray.quantize(W, Grid(4), (1,))
    laid_out, _, _ = compress(kernel_layouts("tpu"), {"embedding": table})
    assert laid_out["embedding"].storage == "dense" and laid_out["embedding"].is_table


def test_xla_reads_the_same_bytes_and_tables_still_serve_lookups():
    table = QuantizedArray.quantize(W, Grid(4), (1,))
    laid_out, _, _ = compress(kernel_layouts("xla"), {"embedding": table, "kernel": quantized(act_bits=0)})
    found, ids = laid_out["embedding"], jnp.array([3, 200])
    assert found.storage == laid_out["kernel"].storage == "bytes"
    assert found.packed.dtype == jnp.uint8 and found.nbytes == table.nbytes
    take = jax.jit(compressed(lambda table, ids: table[ids]))
    np.testing.assert_array_equal(take(found, ids), take(table, ids))


@pytest.mark.parametrize("arguments, message", [(("cuda",), "'cuda' is unknown"), ((None, 0), "rows must be positive")])
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_layouts(*arguments)
