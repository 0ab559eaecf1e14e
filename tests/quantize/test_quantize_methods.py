"""Every weight quantizer goes through the same properties; a new method adds one row to `METHODS`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import is_compressed, leaves_with_paths, replace_leaves
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import chain, compress
from jaxcomp.formats import QuantizedArray
from jaxcomp.quantize import awq, awq_scale, gptq, rtn, smoothquant
from jaxcomp.quantize.scheme import KERNELS


@dataclasses.dataclass
class Method:
    """`make(**options)` builds the transform, which quantizes to `bits`.

    `one_pass()` builds the one that treats an unrolled model as a scanned one, all layers at once, where `make` does not.
    """

    make: Callable
    bits: int = 4
    data: bool = True
    one_pass: Callable | None = None


def _awq_scale_gptq(rules=KERNELS, **gptq_options):
    shared = dict(rules=rules, group_size=8, symmetric=False)
    return chain(awq_scale(3, **shared), gptq(3, act_order=True, **shared, **gptq_options))


METHODS = {
    "rtn": Method(lambda **o: rtn(4, **o), data=False),
    "gptq": Method(lambda **o: gptq(4, **o), one_pass=lambda: gptq(4, sequential=False)),
    "awq": Method(lambda **o: awq(4, group_size=8, **o)),
    "smoothquant + rtn": Method(lambda **o: chain(smoothquant(), rtn(8, act_bits=8, **o)), 8),
    "awq_scale + gptq": Method(_awq_scale_gptq, 3, one_pass=lambda: _awq_scale_gptq(sequential=False)),
}
DATA_METHODS = [name for name, method in METHODS.items() if method.data]


@pytest.fixture(scope="module")
def result(toy):
    """`result(name)`: the compressed tree of a method with its default rules, computed once."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = compress(METHODS[name].make(), toy.params, toy.data)[0]
        return done[name]

    return get


def compressed_leaves(params):
    return {path: leaf for path, leaf in leaves_with_paths(params).items() if is_compressed(leaf)}


@pytest.mark.parametrize("name", METHODS)
def test_jitted_model_runs_and_stays_close(name, toy, result):
    out = jax.jit(compressed(toy.apply))(result(name), toy.x)
    want = toy.apply(toy.params, toy.x)
    error = float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want))
    assert 0 < error < {8: 0.03, 4: 0.4, 3: 0.6}[METHODS[name].bits]


@pytest.mark.parametrize("name", METHODS)
def test_structure_shapes_and_dtypes_are_those_of_the_model(name, toy, result):
    before, after = leaves_with_paths(toy.params), leaves_with_paths(result(name))
    assert list(before) == list(after)
    assert {p: (x.shape, x.dtype) for p, x in before.items()} == {p: (x.shape, x.dtype) for p, x in after.items()}


@pytest.mark.parametrize("name", METHODS)
def test_all_kernels_and_nothing_else_are_packed(name, toy, result):
    found = compressed_leaves(result(name))
    assert set(found) == {path for path in leaves_with_paths(toy.params) if path.endswith("kernel")}
    assert all(isinstance(leaf, QuantizedArray) and leaf.grid.bits == METHODS[name].bits for leaf in found.values())


@pytest.mark.parametrize("name", METHODS)
def test_rules_choose_bits_and_skipped_leaves_stay_untouched(name, toy):
    rules = (Rule("blocks_1/mlp/down", skip=True), Rule("head", bits=16), Rule("blocks_0/mlp/gate", bits=5), *KERNELS)
    out = leaves_with_paths(compress(METHODS[name].make(rules=rules), toy.params, toy.data)[0])
    for path in ("blocks_1/mlp/down/kernel", "head/kernel"):
        np.testing.assert_array_equal(out[path], leaves_with_paths(toy.params)[path])
    assert out["blocks_0/mlp/gate/kernel"].grid.bits == 5
    assert out["blocks_0/mlp/up/kernel"].grid.bits == METHODS[name].bits


@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_gives_the_same_bits(name, toy, result):
    again = compress(METHODS[name].make(), toy.params, toy.data)[0]
    jax.tree.map(np.testing.assert_array_equal, again, result(name))


@pytest.mark.parametrize("name", METHODS)
def test_scanned_layers_give_what_unrolled_layers_give(name, toy, scanned_toy):
    method = METHODS[name]
    stacked = compressed_leaves(compress(method.make(), scanned_toy.params, scanned_toy.data)[0])
    single = compressed_leaves(compress((method.one_pass or method.make)(), toy.params, toy.data)[0])
    for path, leaf in stacked.items():
        parts = [leaf] if path.startswith("head") else [jax.tree.map(lambda a, i=i: a[i], leaf) for i in (0, 1)]
        for i, part in enumerate(parts):
            want = single[path.replace("blocks/", f"blocks_{i}/")]
            assert float(jnp.mean(part.codes() == want.codes())) > 0.99, path
            np.testing.assert_allclose(part.scale, want.scale, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_nan_weight_is_an_error_that_names_the_leaf(name, toy):
    path = "blocks_1/mlp/up/kernel"
    bad = replace_leaves(toy.params, {path: leaves_with_paths(toy.params)[path].at[2, 3].set(jnp.nan)})
    with pytest.raises(ValueError, match=path):
        compress(METHODS[name].make(), bad, toy.data)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_params_keep_their_dtype(name, toy):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), toy.params)
    data = type(toy.data)(toy.apply, [x.astype(jnp.bfloat16) for x in toy.data.batches])
    out = compress(METHODS[name].make(), half, data)[0]
    assert {leaf.dtype for leaf in leaves_with_paths(out).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", DATA_METHODS)
def test_missing_calibration_data_is_an_error_with_a_remedy(name, toy):
    with pytest.raises(ValueError, match=r"needs calibration data; call compress\(.*Calibration\(apply, batches\)"):
        compress(METHODS[name].make(), toy.params)
