"""The counters give the printed figures of the challenge exactly, count every construct of JAX, and flag their traps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxcomp.evaluate.complexity import Complexity, complexity
from jaxcomp.io.super_resolution import param_shapes
from jaxcomp.models.ditn import ditn_real
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import RLFN, rlfn_ntire, rlfn_s


def of_network(model, size=256):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return complexity(lambda params, x: model.apply({"params": params}, x), param_shapes(model), image)


def of_module(module, *shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x).get("params", {})
    return complexity(lambda params, x: module.apply({"params": params}, x), params, x)


@pytest.mark.parametrize(
    "model, params, macs, rectified, activations, convs",
    [
        (rlfn_ntire(), 317_218, 19_658_082_304, 37_224_448, 80_045_184, 39),
        (IMDN(), 893_936, 58_430_849_024, 100_663_296, 154_140_672, 43),
        (RFDN(), 433_448, 27_033_648_384, 68_974_176, 112_034_240, 64),
    ],
)
def test_figures_of_the_challenge(model, params, macs, rectified, activations, convs):
    found = of_network(model)
    assert (found.params, found.conv_macs, found.rectified) == (params, macs, rectified)
    assert (found.flops, found.activations, found.convs) == (macs + rectified, activations, convs)
    assert found.linear_macs == found.matmul_macs == 0


@pytest.mark.parametrize(
    "model, giga, mega, convs",
    [(RLFN(), 33.993, 126.49, 57), (rlfn_s(), 29.177, 118.10, 57), (RLFN(48, 48, 4), 20.386, 81.88, 39)],
)
def test_figures_of_the_rlfn_paper(model, giga, mega, convs):
    found = of_network(model)
    assert round(found.flops / 1e9, 3) == giga and round(found.activations / 1e6, 2) == mega and found.convs == convs


def test_transformer_is_flattered_and_flagged():
    found = of_network(ditn_real())
    assert found.params == 444_112
    assert round((found.conv_macs + found.linear_macs) / 1e9, 2) == 28.87 and round(found.matmul_macs / 1e9, 2) == 1.89
    assert found.macs - found.flops > 4e9
    assert [flag.split(":")[0] for flag in found.flags] == [
        "linear layers",
        "products of activations",
        "sigmoid, tanh, GELU",
    ]
    assert f"{found.matmul_macs:,} MACs are counted as 0" in found.flags[1]


def test_linear_layer_on_a_map_counts_height_squared():
    found = of_module(nn.Dense(7), 2, 10, 12, 5)
    assert found.linear_macs == 2 * 10 * 12 * 5 * 7 and found.linear_outputs == 2 * 10 * 12 * 7
    assert found.flops == found.linear_counted == 2 * 10 * 10 and found.activations == 0
    assert "8,400 MACs are counted as 200" in found.flags[0]
    assert of_module(nn.Dense(7), 3, 5).flops == 3 * 5 * 7


@pytest.mark.parametrize(
    "function, counted", [(nn.relu, 1), (nn.leaky_relu, 1), (nn.relu6, 1), (nn.elu, 1), (nn.gelu, 0)]
)
def test_activations_cost_one_per_element_or_nothing(function, counted):
    found = complexity(lambda _, x: function(x), {}, jnp.ones((3, 4)))
    assert found.flops == 12 * counted and bool(found.flags) == (not counted)
    assert complexity(lambda _, x: nn.silu(x), {}, jnp.ones((3, 4))).flops == 0


def test_grouped_strided_and_transposed_convolutions():
    assert of_module(nn.Conv(8, (3, 3), feature_group_count=4), 1, 6, 6, 4).conv_macs == 36 * 8 * 9
    assert of_module(nn.Conv(8, (3, 3), strides=2, padding="VALID"), 2, 7, 7, 4).conv_macs == 2 * 9 * 8 * 9 * 4
    assert of_module(nn.ConvTranspose(8, (2, 2), strides=(2, 2)), 1, 5, 5, 4).conv_macs == 100 * 8 * 4 * 4


def test_interpolation_counts_nothing():
    assert complexity(lambda _, x: jax.image.resize(x, (1, 8, 8, 3), "bilinear"), {}, jnp.ones((1, 4, 4, 3))).macs == 0


def matmul(w, x):
    return nn.relu(x @ w)


W, X = jnp.ones((4, 4)), jnp.ones((3, 4))


@pytest.mark.parametrize(
    "apply, times",
    [
        (jax.jit(matmul), 1),
        (jax.checkpoint(matmul), 1),
        (lambda w, x: jax.lax.scan(lambda x, _: (matmul(w, x), None), x, length=5)[0], 5),
        (lambda w, x: jax.lax.fori_loop(0, 4, lambda _, x: matmul(w, x), x), 4),
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: matmul(w, matmul(w, x)), lambda: x), 2),
        (lambda w, x: jax.vmap(lambda row: matmul(w, row[None]))(x), 1),
    ],
)
def test_every_construct_is_entered(apply, times):
    found = complexity(apply, W, X)
    assert found.linear_macs + found.matmul_macs == times * 3 * 4 * 4 and found.rectified == times * 12


def test_gradients_are_work_too():
    loss = lambda w, x: matmul(w, x).sum()
    assert complexity(jax.grad(loss), W, X).macs == 2 * 48


def test_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="while: a loop of unknown length"):
        complexity(lambda w, x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: matmul(w, x), x), W, X)


def test_compressed_leaves_count_by_their_logical_shape():
    """Their params do; products are those of the kernel that runs, so that models are counted in their plain form."""
    from jaxcomp.core.apply import compressed
    from jaxcomp.core.leaf import materialise_tree
    from jaxcomp.quantize import rtn

    module, x = nn.Dense(16, name="layer"), jnp.ones((3, 32))
    params = {"layer": module.init(jax.random.key(0), x)["params"]}
    small, _ = rtn(bits=4).update(params, rtn(bits=4).init(params), None)
    apply = lambda params, x: module.apply({"params": params["layer"]}, x)
    dense, quantized = complexity(apply, params, x), complexity(compressed(apply), small, x)
    assert dense.params == quantized.params == 32 * 16 + 16
    assert dense.macs == complexity(apply, materialise_tree(small), x).macs == 3 * 32 * 16


def test_an_empty_model_has_no_flags():
    assert Complexity(params=3).flags == () and Complexity(params=3).flops == 0
