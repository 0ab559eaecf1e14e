"""What surrounds a C++ convolution runs inside its call, with the same result; what others read is left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import compress
from jaxcomp.deploy import cpu_convolutions, fuse_convolutions, fusions
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import RLFN
from jaxcomp.models.sr_blocks import ESA
from pallas_kernels import native

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def setup(model, dtype=jnp.float32, channels=3):
    """(compressed apply, weights in the native form, weights, input)."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, (2, 18, 21, channels)), dtype)
    params = jax.jit(model.init)(jax.random.key(0), x.astype(jnp.float32))
    params = jax.tree.map(lambda p: jnp.asarray(p + rng.normal(0, 0.1, p.shape), dtype), params)
    return compressed(model.apply), compress(cpu_convolutions(True), params)[0], params, x


@pytest.mark.parametrize("model", [RLFN(6, 6, 1, 4), IMDN(8, 1)])
def test_result_is_that_of_the_plain_network(model):
    apply, formed, params, x = setup(model)
    want = jax.jit(apply)(params, x)
    np.testing.assert_allclose(jax.jit(fuse_convolutions(apply))(formed, x), want, atol=2e-6 * float(jnp.ptp(want)))


def test_bfloat16_is_rounded_no_worse():
    model = RLFN(6, 6, 1, 4)
    apply, formed, params, x = setup(model, jnp.bfloat16)
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    want = jax.jit(apply)(single(params), single(x))
    error = lambda y: float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - want) ** 2)))
    fused = jax.jit(fuse_convolutions(apply))(formed, x)
    assert fused.dtype == jnp.bfloat16
    assert error(fused) < 1.1 * error(jax.jit(apply)(formed, x)) < 0.01 * float(jnp.ptp(want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imdn_reads_channels_in_place(dtype):
    apply, formed, _, x = setup(IMDN(8, 1), jnp.dtype(dtype))
    assert list(map(str, fusions(apply, formed, x))) == [
        "3x3x3x8 of channels 0:3: bias",
        "3x3x8x8 of channels 0:8: bias, leaky_relu",
        "3x3x6x8 of channels 2:8: bias, leaky_relu",
        "3x3x6x8 of channels 2:8: bias, leaky_relu",
        "3x3x6x2 of channels 2:8: bias",
        "1x1x8x8 of channels 0:2 | 0:2 | 0:2 | 0:2: bias, add",
        "3x3x8x8 of channels 0:8: bias, add",
        "3x3x8x48 of channels 0:8: bias",
    ]


def test_rlfn_takes_over_activation_residual_and_gate():
    apply, formed, _, x = setup(RLFN(6, 6, 1, 4))
    taken = [str(fusion).split(": ")[1] for fusion in fusions(apply, formed, x)]
    assert taken.count("bias, leaky_relu") == 2 and {"bias, leaky_relu, add", "bias, sigmoid, multiply"} <= set(taken)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_attention_steps_and_resizes_in_calls(dtype, tolerance):
    apply, formed, params, x = setup(ESA(4, depth=1), jnp.dtype(dtype), channels=6)
    assert list(map(str, fusions(apply, formed, x))) == [
        "1x1x6x4 of channels 0:6: bias",
        "3x3x4x4 of channels 0:4: bias",
        "3x3x4x4 of channels 0:4: bias",
        "1x1x4x4 of channels 0:4: bias, add_resized",
        "1x1x4x6 of channels 0:4: bias, sigmoid, multiply",
    ]
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(fuse_convolutions(apply))(formed, x).eqns]
    assert "conv_general_dilated" not in names and "dot_general" not in names
    found, want = (f.astype(jnp.float32) for f in (jax.jit(fuse_convolutions(apply))(formed, x), apply(params, x)))
    np.testing.assert_allclose(found, want, atol=tolerance * float(jnp.ptp(want)))


def test_rfdn_adds_before_it_activates():
    apply, formed, params, x = setup(RFDN(6, 1))
    taken = [str(fusion).split(": ")[1] for fusion in fusions(apply, formed, x)]
    assert taken.count("bias, leaky_relu, add_first") == 3
    want = jax.jit(apply)(params, x)
    np.testing.assert_allclose(jax.jit(fuse_convolutions(apply))(formed, x), want, atol=2e-6 * float(jnp.ptp(want)))


class Rest(nn.Module):
    """One convolution, and what `rest(y, x)` does with its sums."""

    rest: object
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return self.rest(nn.Conv(4, (3, 3), use_bias=self.use_bias)(x), x)


def resized(z, shape, method="bilinear", antialias=False):
    """A part of a map, resized to a shape."""
    return jax.image.resize(z[:, :3, ::5], shape, method, antialias=antialias)


RESTS = [
    ("bias, add_resized", lambda y, x: y + resized(x, y.shape)),
    ("bias, leaky_relu, add_resized", lambda y, x: jnp.tanh(resized(x, y.shape) + nn.relu(y))),
    ("bias, add_resized", lambda y, x: nn.relu(y + resized(x, y.shape))),
    ("bias, add", lambda y, x: y + resized(x, y.shape, "nearest")),
    ("bias, add", lambda y, x: y + resized(x, y.shape, "cubic")),
    ("bias, add", lambda y, x: (z := resized(x, y.shape)) * (y + z)),  # two read it
    ("bias, multiply", lambda y, x: y * resized(x, y.shape)),
    ("bias, leaky_relu, multiply", lambda y, x: x * nn.relu(y)),
    ("bias, leaky_relu", lambda y, x: nn.leaky_relu(y, 0.2) + jnp.ones(4)[None, None, None, :] * 2),
    ("bias, leaky_relu, add_first", lambda y, x: nn.relu(y + x)),
    ("bias, sigmoid, add_first", lambda y, x: nn.sigmoid(x + y) * x),
    ("bias, add", lambda y, x: jnp.tanh(y + x)),
    ("bias, multiply", lambda y, x: nn.relu(y * x)),
    ("bias", lambda y, x: (y, nn.relu(y))),  # a caller reads it
    ("bias", lambda y, x: y * nn.sigmoid(y)),  # two read it
    ("bias", lambda y, x: jnp.where(y > 0, y, 0.1 * y)),  # not the comparison of a leaky ReLU
    ("bias", lambda y, x: jnp.maximum(y, 1.0)),
    ("bias", lambda y, x: y + y),
    ("bias", lambda y, x: y * 3.0),
]


@pytest.mark.parametrize("taken, rest", RESTS)
def test_only_what_may_be_taken_over_is(taken, rest):
    apply, formed, params, x = setup(Rest(rest), channels=4)
    assert list(map(str, fusions(apply, formed, x))) == [f"3x3x4x4 of channels 0:4: {taken}"]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, jax.jit(fuse_convolutions(apply))(formed, x), jax.jit(apply)(params, x))


def test_without_bias_a_map_over_rows_is_no_bias():
    over_rows = lambda y, x: y + jnp.arange(21.0)[None, None, :, None]
    apply, formed, params, x = setup(Rest(over_rows, use_bias=False), channels=4)
    (fusion,) = fusions(apply, formed, x)
    assert not fusion.has_bias
    np.testing.assert_allclose(jax.jit(fuse_convolutions(apply))(formed, x), jax.jit(apply)(params, x), atol=1e-5)


def test_odd_channels_are_not_split_off():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3))(jnp.concatenate([x[..., 3:], x[..., :2]], -1))

    apply, formed, params, x = setup(Odd(), jnp.bfloat16, channels=4)
    (fusion,) = fusions(apply, formed, x)
    assert fusion.ranges == ((0, 3),)
    found, want = (
        f.astype(jnp.float32) for f in (jax.jit(fuse_convolutions(apply))(formed, x), jax.jit(apply)(params, x))
    )
    np.testing.assert_allclose(found, want, atol=0.02 * float(jnp.ptp(want)))


def test_other_functions_stay_as_they_are():
    apply, _, params, x = setup(RLFN(6, 6, 1, 4))
    assert fusions(apply, params, x) == ()
    np.testing.assert_array_equal(jax.jit(fuse_convolutions(apply))(params, x), jax.jit(apply)(params, x))


def test_gradients_and_other_machines_run_xla():
    apply, formed, params, x = setup(IMDN(8, 1))
    loss = lambda run, params: lambda x: jnp.sum(jnp.sin(run(params, x)))
    found, want = (jax.jit(jax.grad(loss(*run)))(x) for run in ((fuse_convolutions(apply), formed), (apply, params)))
    np.testing.assert_allclose(found, want, atol=1e-4 * float(jnp.abs(want).max()))
    traced = jax.jit(fuse_convolutions(apply)).trace(formed, x)
    text = {machine: traced.lower(lowering_platforms=(machine,)).as_text() for machine in ("cpu", "tpu", "cuda")}
    assert [machine for machine in text if "pallas_kernels_convolution" in text[machine]] == ["cpu"]


def test_vmap():
    apply, formed, _, x = setup(IMDN(4, 1))
    run = fuse_convolutions(apply)
    found = jax.jit(jax.vmap(run, (None, 0)))(formed, x[:, None])[:, 0]
    np.testing.assert_allclose(found, jax.jit(run)(formed, x), atol=1e-5)
