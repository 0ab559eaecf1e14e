"""Convolutions in another form answer as before, and say which form that is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.apply import compressed, explain
from jaxcomp.core.leaf import leaves_with_paths, nbytes
from jaxcomp.core.transform import chain, compress
from jaxcomp.deploy import cpu_convolutions
from jaxcomp.formats import ConvFormArray
from jaxcomp.models.ditn import DITN
from jaxcomp.models.rlfn import RLFN
from jaxcomp.quantize import rtn
from pallas_kernels import native

NATIVE = [False, pytest.param(True, marks=pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler"))]


class Convolutions(nn.Module):
    """Every kind of convolution that a form may meet, in pairs of one that it covers and one that it does not."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="odd_channels")(x)
        x = nn.Conv(8, (1, 1), name="one_pixel")(x)
        x = nn.Conv(8, (3, 3), strides=2, padding="VALID", name="strided")(x)
        x = nn.Conv(8, (3, 5), kernel_dilation=(2, 1), feature_group_count=8, name="depthwise")(x)
        x = nn.Conv(8, (3, 3), strides=2, feature_group_count=8, name="strided_depthwise")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(5, (2, 2), name="even_window")(x)
        return nn.Conv(4, (3, 3), kernel_dilation=2, name="dilated")(x)


def setup(model, size=24, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, (2, size, size, 3)), dtype)
    params = jax.jit(model.init)(jax.random.key(0), x.astype(jnp.float32))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(p + rng.normal(0, 0.1, p.shape), dtype), params)
    return (lambda params, x: model.apply({"params": params}, x)), params, x


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("model", [Convolutions(), RLFN(6, 6, 1, 4), DITN(8, inner_layers=1, spatial_layers=1)])
def test_result_is_that_of_the_plain_network(model, native):
    apply, params, x = setup(model)
    formed, _, _ = compress(cpu_convolutions(native), params)
    assert nbytes(formed) == nbytes(params)
    want = jax.jit(apply)(params, x)
    np.testing.assert_allclose(jax.jit(compressed(apply))(formed, x), want, atol=2e-5 * float(jnp.ptp(want)))


@pytest.mark.parametrize("native", NATIVE)
def test_bfloat16_stays_bfloat16(native):
    apply, params, x = setup(RLFN(6, 6, 1, 4), dtype=jnp.bfloat16)
    formed, _, _ = compress(cpu_convolutions(native), params)
    want, found = jax.jit(apply)(params, x), jax.jit(compressed(apply))(formed, x)
    assert found.dtype == jnp.bfloat16
    close = lambda y: y.astype(jnp.float32)
    np.testing.assert_allclose(close(found), close(want), atol=0.03 * float(jnp.ptp(close(want))))


def test_explain_says_which_form_ran():
    apply, params, x = setup(Convolutions())
    formed, _, _ = compress(cpu_convolutions(False), params)
    kernels = {
        path.split("/")[0]: name
        for path in leaves_with_paths(formed)
        for name in explain(apply, formed, x).kernels(path)
    }
    assert kernels["depthwise"] == "shifted_conv" and kernels["odd_channels"] == kernels["strided"] == "aligned_conv"
    assert kernels["strided_depthwise"] == kernels["grouped"] == "materialised"


@pytest.mark.parametrize("model", [RLFN(6, 6, 1, 4), DITN(8, inner_layers=1, spatial_layers=1)])
def test_gradients_pass_through_forms_of_xla(model):
    apply, params, x = setup(model, size=16)
    transform = cpu_convolutions(False)
    plain = lambda params: jnp.sum(jnp.sin(apply(params, x)))
    formed = lambda params: jnp.sum(jnp.sin(compressed(apply)(transform.update(params, None, None)[0], x)))
    want, found = jax.jit(jax.grad(plain))(params), jax.jit(jax.grad(formed))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(a).max()))), want, found
    )


def test_comes_after_quantization():
    apply, params, x = setup(DITN(8, inner_layers=1, spatial_layers=1))
    both, _, _ = compress(chain(rtn(8), cpu_convolutions(False)), params)
    assert not any(isinstance(leaf, ConvFormArray) for leaf in leaves_with_paths(both).values())
    assert jnp.isfinite(jax.jit(compressed(apply))(both, x)).all()


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form: expected one of aligned, native, shifted, found 'winograd'"):
        ConvFormArray(jnp.zeros((3, 3, 4, 4)), "winograd")
