"""The Triton kernels, interpreted and compiled ahead of time where Triton is installed; what the other GPU back ends lack."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from sparse_problems import Case, arrays, options, orders

from pallas_kernels.sparse_attention import api, gpu_triton, reference
from pallas_kernels.sparse_attention.spec import Spec

SMALL = Case(4, 2, 100, 100, dim=16, segment=32, block_q=16, block_k=16, check_every=2)
CASES = {
    "lists": SMALL,
    "groups": SMALL._replace(share_group=True, stop="budget", aggregate="ratio"),
    "cache": SMALL._replace(length=60, start=40, aggregate="max"),
    "others": SMALL._replace(causal=False, guide="none"),
}


def problem(case, threshold=0.05):
    """(inputs, spec) as `api` hands them to a back end."""
    static = options(case)
    start = static.pop("start")
    spec = Spec(length=case.length, **static)
    q, k, v = arrays(case)
    order, places = orders(q, k, case)
    return api._inputs(q, k, v, order, threshold, places, None, start, spec), spec


def reference_outputs(x, spec):
    return jax.jit(functools.partial(reference.attend, spec=spec))(x)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels(name):
    pytest.importorskip("triton")
    folder = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parents[1]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(folder / "sparse_triton_numpy.py"), name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_pipelined_tensor_core_loops(capability):
    """Copies ahead of the products (cp.async) and tensor cores, in shared memory that the device has."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.sparse_attention import triton_kernels

    case = Case(8, 2, 4096, 4096, dim=128, segment=1024, block_q=128, block_k=64, check_every=4)
    static = options(case)
    spec = Spec(length=4096, **{k: v for k, v in static.items() if k != "start"})
    shape = lambda *s, t=jnp.bfloat16: jax.ShapeDtypeStruct(s, t)
    q, kv, lists = shape(8, 4096, 128), shape(2, 4096, 128), shape(8, 4, 3072, t=jnp.int32)
    x = jax.eval_shape(lambda q, k, v, o: api._inputs(q, k, v, o, 0.1, None, None, 0, spec), q, kv, kv, lists)
    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16"}
    types |= dict.fromkeys(("start_ptr", "order_ptr", "count_ptr", "rows_ptr", "blocks_ptr"), "*i32")
    for kernel, values in zip(
        (triton_kernels.window, triton_kernels.visit), gpu_triton.constants(x, spec), strict=True
    ):
        signature = {name: "constexpr" if name in values else types.get(name, "*fp32") for name in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith(("_ptr", "_in"))
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert "cp.async" in compiled.asm["ptx"]
        assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
        assert compiled.metadata.shared < (227 if capability == 90 else 163) * 1024


def test_refusals_say_why():
    x, spec = problem(SMALL)
    assert "no GPU" in gpu_triton.refuse(spec, x)
    assert "24 block_k" in gpu_triton.refuse(Spec(100, 32, 16, 24), x)
    assert "float16" in gpu_triton.refuse(spec, x._replace(k=x.k.astype(jnp.float16)))
    reasons = api.choose(spec, x, api.preference()["cuda"]).reasons
    assert "Blackwell" in reasons["mosaic_gpu"] and "no GPU" in reasons["triton"]
