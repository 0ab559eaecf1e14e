"""Binary tensor-core product: fragments through a NumPy model of the instruction; the Triton kernel interpreted and compiled."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arbitrary_bit_matmul import WeightSpec, bmma, gpu_triton


def mma_b1(w, x):
    """m16n8k256 and.popc on one warp's fragments: uint32 w [32, 4] and x [32, 2] to int32 [32, 4]."""
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    a, b = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)
    for r in range(4):
        a[g + 8 * (r % 2), t + 4 * (r // 2)] = w[:, r]
    for r in range(2):
        b[t + 4 * r, g] = x[:, r]
    count = np.bitwise_count(a[:, :, None] & b[None]).sum(1).astype(np.int32)
    return np.stack([count[g + 8 * (r // 2), 2 * t + r % 2] for r in range(4)], 1)


def problem(bits, groups, m=2, n=24, k=512):
    rng = np.random.default_rng(bits)
    spec = WeightSpec(n, k, groups, bits)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    scale = rng.random((n, groups)).astype(np.float32)
    grouped = lambda a: a.reshape(a.shape[0], groups, -1).astype(np.int64)
    want = np.einsum("mgk,ngk,ng->mn", grouped(x), grouped(codes) - spec.centre, scale.astype(np.float64))
    return jnp.asarray(x), codes, jnp.asarray(scale), spec, want


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_fragments_multiply_exactly(bits):
    """Every plane's product, weighted by 2^(a + p), adds up to the integer product, for ragged sizes."""
    x, codes, *_ = problem(bits, 1, m=1, n=20, k=300)
    w, fragments = np.asarray(bmma.pack_weight(codes, bits)), np.asarray(bmma.pack_activations(x))[0]
    weight = np.where(np.arange(8) == 7, -128, 1 << np.arange(8))
    lane, register = np.arange(32)[:, None], np.arange(4)[None]
    row, column = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
    y = np.zeros((w.shape[0], 16), np.int64)
    for tile, k, p in np.ndindex(*w.shape[:3]):
        np.add.at(y[tile], row, (mma_b1(w[tile, k, p], fragments[k]) << p) * weight[column])
    np.testing.assert_array_equal(y.reshape(-1)[:20], (np.asarray(x, np.int64) @ codes.T)[0])


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_layout_round_trip(bits):
    codes = problem(bits, 1, n=17, k=300)[1]
    fragments = bmma.pack_weight(codes, bits)
    assert fragments.shape == (2, 2, bits, 32, 4)
    np.testing.assert_array_equal(bmma.unpack_weight(fragments, 17, 300), codes)


@pytest.mark.parametrize(("bits", "groups"), [(3, 1), (2, 4), (4, 2)])
def test_interpreted_kernel(bits, groups):
    pytest.importorskip("triton")
    folder = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(folder / "triton_numpy.py"), str(bits), str(groups)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3])
def test_compiles_to_binary_products(bits):
    """For compute capability 9.0: one vector load and one binary product per plane and tile, in the layout they rely on."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.arbitrary_bit_matmul.triton_kernels import bmma_gemv

    constants = {"N": 4096, "KT": 16, "P": bits, "GROUPS": 1, "HALVES": 1, "PARTS": 16}
    arrays = {"w_ptr": "*u32", "x_ptr": "*u32", "sums_ptr": "*i32", "scale_ptr": "*fp32", "y_ptr": "*fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    signature = {**arrays, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=bmma_gemv, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert compiled.asm["ptx"].count("m16n8k256.row.col.s32.b1.b1.s32.and.popc") % bits == 0
    assert compiled.asm["ptx"].count("ld.global.v4") >= bits
    assert "sizePerThread = [4], threadsPerWarp = [32]" in compiled.asm["ttgir"]


def test_refusals_say_why():
    x = jnp.zeros((1, 512), jnp.int8)
    assert "no GPU" in gpu_triton.refuse(WeightSpec(16, 512, 1, 4), x)
    assert "groups of 64" in gpu_triton.refuse(WeightSpec(16, 512, 8, 4), x)
    assert "9 rows" in gpu_triton.refuse(WeightSpec(16, 512, 1, 4), jnp.zeros((9, 512), jnp.int8))
