"""The TPU kernel: interpreted against exact products, lowered for TPU, compiled ahead of time where libtpu is installed."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arbitrary_bit_matmul import WeightSpec, tpu
from pallas_kernels.arbitrary_bit_matmul.layouts import LAYOUTS, Prepared

CASES = {  # bits, M, N, K, groups
    "planes, 3 bits, two groups in a block": (3, 3, 120, 256, 2),
    "planes, 1 bit, ragged K": (1, 2, 128, 300, 1),
    "int4, groups of 256": (4, 40, 130, 768, 3),
    "int8, ragged": (8, 1, 100, 45, 1),
}


def problem(bits, m, n, k, groups, dtype=np.int8, seed=0):
    rng = np.random.default_rng(seed)
    spec = WeightSpec(n, k, groups, bits)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    x = rng.integers(-128, 128, (m, k)).astype(dtype)
    scale = (2.0 ** rng.integers(-2, 3, (n, groups))).astype(np.float32)
    layout = tpu.layouts(spec)[0]
    weight = Prepared(LAYOUTS[layout].pack(jnp.asarray(codes), spec), layout)
    grouped = lambda a: a.reshape(a.shape[0], groups, -1).astype(np.int64)
    want = np.einsum("mgk,ngk,ng->mn", grouped(x), grouped(codes) - spec.centre, scale.astype(np.float64))
    return jnp.asarray(x), weight, jnp.asarray(scale), spec, codes, want


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_is_exact(case):
    x, weight, scale, spec, _, want = problem(*CASES[case])
    y = jax.jit(functools.partial(tpu.matmul, spec=spec, interpret=True))(x, weight, scale)
    np.testing.assert_array_equal(y, want.astype(np.float32))


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 4), (jnp.float32, 2)])
def test_floating_point_activations(dtype, bits):
    x, weight, scale, spec, _, want = problem(bits, 2, 128, 256, 1)
    y = jax.jit(functools.partial(tpu.matmul, spec=spec, interpret=True))(x.astype(dtype), weight, scale)
    np.testing.assert_array_equal(y, want.astype(np.float32))  # products of small integers


def test_simulated_tpu_finds_no_race():
    x, weight, scale, spec, _, want = problem(2, 2, 128, 512, 2)
    y = tpu.matmul(x, weight, scale, spec, interpret=pltpu.InterpretParams(detect_races=True))
    np.testing.assert_array_equal(y, want.astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_layouts_round_trip(bits):
    _, weight, _, spec, codes, _ = problem(bits, 1, 45, 300 if bits % 2 else 512, 1 if bits % 2 else 2)
    for name in tpu.layouts(spec):
        layout = LAYOUTS[name]
        np.testing.assert_array_equal(layout.unpack(layout.pack(codes, spec), spec), codes)
    padded = 512 * 128
    width = {"kn_planes": 32, "kn_int4": 4, "kn_int8": 8}[weight.layout]
    assert weight.data.size * width == padded * (bits if bits <= 4 else 8)


def lowered_arguments(case, dtype):
    x, weight, scale, spec, *_ = problem(*CASES[case])
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x.astype(dtype), weight, scale))
    return functools.partial(tpu.matmul, spec=spec), avals


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_exports_for_tpu(case, dtype):
    f, avals = lowered_arguments(case, dtype)
    exported = jax.export.export(jax.jit(f), platforms=["tpu"])(*avals)
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_compiles_for_tpu(case, dtype, topology, monkeypatch):
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    f, avals = lowered_arguments(case, dtype)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    traced = jax.jit(f, in_shardings=sharding, out_shardings=sharding).trace(*avals)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_refusals_say_why():
    x, *_ = problem(4, 1, 8, 256, 1)
    assert "groups of 64" in tpu.refuse(WeightSpec(8, 256, 4, 4), x)
    assert "float16" in tpu.refuse(WeightSpec(8, 256, 1, 4), x.astype(jnp.float16))
