"""The Hopper kernel: lowered for CUDA on every jax, interpreted where jax has a public GPU interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arbitrary_bit_matmul import WeightSpec, gpu_mosaic
from pallas_kernels.arbitrary_bit_matmul.layouts import LAYOUTS, Prepared

CASES = {  # bits, groups, dtype of x
    "4 bits, groups of 128, bfloat16": (4, 2, jnp.bfloat16),
    "8 bits, one group, bfloat16": (8, 1, jnp.bfloat16),
    "4 bits, one group, int8": (4, 1, jnp.int8),
    "8 bits, one group, int8": (8, 1, jnp.int8),
}


def problem(bits, groups, dtype, m=20, n=120, k=256):
    rng = np.random.default_rng(0)
    spec = WeightSpec(n, k, groups, bits)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    x = rng.integers(-8, 8, (m, k)).astype(np.int8)
    scale = (2.0 ** rng.integers(-2, 3, (n, groups))).astype(np.float32)
    layout = gpu_mosaic.layouts(spec)[0]
    weight = Prepared(LAYOUTS[layout].pack(jnp.asarray(codes), spec), layout)
    grouped = lambda a: a.reshape(a.shape[0], groups, -1).astype(np.int64)
    want = np.einsum("mgk,ngk,ng->mn", grouped(x), grouped(codes) - spec.centre, scale.astype(np.float64))
    return jnp.asarray(x).astype(dtype), weight, jnp.asarray(scale), spec, codes, want


@pytest.mark.parametrize("case", CASES)
def test_exports_for_cuda(case):
    x, weight, scale, spec, *_ = problem(*CASES[case])
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, weight, scale))
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    f = jax.jit(functools.partial(gpu_mosaic.matmul, spec=spec))
    exported = jax.export.export(f, platforms=["cuda"], disabled_checks=[check])(*avals)
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no public GPU interpreter")
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_is_exact(case):
    x, weight, scale, spec, _, want = problem(*CASES[case])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        y = gpu_mosaic.matmul(x, weight, scale, spec, staged=True)
    np.testing.assert_array_equal(y, want.astype(np.float32))  # products of small integers and powers of two


@pytest.mark.parametrize("layout", ["nk_int4", "nk_int8"])
def test_layouts_round_trip(layout):
    *_, spec, codes, _ = problem(3, 1, jnp.int8, n=5, k=45)
    data = LAYOUTS[layout].pack(codes, spec)
    assert data.shape == (128, 128)
    np.testing.assert_array_equal(LAYOUTS[layout].unpack(data, spec), codes)


def test_refusals_say_why():
    spec = WeightSpec(128, 256, 8, 4)
    x = jnp.zeros((32, 256))
    assert "float32" in gpu_mosaic.refuse(spec, x)
    assert "groups of 32" in gpu_mosaic.refuse(spec, x.astype(jnp.bfloat16))
    assert "several groups" in gpu_mosaic.refuse(spec, x.astype(jnp.int8))
    assert "4 rows" in gpu_mosaic.refuse(spec, x[:4].astype(jnp.int8))
