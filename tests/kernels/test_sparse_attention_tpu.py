"""The TPU kernels: interpreted against the reference with races looked for, lowered, compiled ahead where libtpu is installed."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from sparse_problems import Case, arrays, options, orders

from pallas_kernels.sparse_attention import api, reference, tpu
from pallas_kernels.sparse_attention.spec import Spec

LARGE = Case(2, 1, 380, 380, dim=128, segment=128, block_q=64, block_k=64, check_every=2, pool=32)
THRESHOLD = 0.43
CASES = {
    "ragged, lists per query head": LARGE,
    "a group shares a list, ratio": LARGE._replace(share_group=True, aggregate="ratio", guide="mean_key"),
    "behind a cache, budget": LARGE._replace(length=120, start=260, stop="budget", aggregate="max"),
    "all other segments": LARGE._replace(causal=False, guide="none"),
}

QUICK = ("ragged, lists per query head", "behind a cache, budget")
SIMULATED = [pytest.param(c, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, c in CASES.items()]


def problem(case, threshold, dtype=jnp.float32):
    """(inputs, spec) as `api` hands them to a back end."""
    static = options(case)
    start = static.pop("start")
    spec = Spec(length=case.length, **static)

    def build(q, k, v):
        order, places = orders(q, k, case)
        return api._inputs(q, k, v, order, threshold, places, None, start, spec)

    return jax.jit(build)(*arrays(case, dtype)), spec


def assert_same(got, want, atol):
    np.testing.assert_array_equal(got.blocks, want.blocks)
    np.testing.assert_allclose(got.gain, want.gain, rtol=1e-3, atol=1e-6)
    for state in (got.state, want.state):
        assert np.all(np.isfinite(state.acc))
    out = lambda state: np.asarray(state.acc / state.norm[..., None])
    np.testing.assert_allclose(out(got.state), out(want.state), atol=atol)


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_kernel_stops_as_the_reference_and_has_no_race(case):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    x, spec = problem(case, THRESHOLD)
    want = jax.jit(functools.partial(reference.attend, spec=spec))(x)
    assert_same(tpu.attend(x, spec, interpret=interpret), want, 5e-5)
    total = -(-np.asarray(x.count) // spec.block_k)[..., None]
    assert np.any((want.blocks < total) & (want.blocks > 0))


@pytest.mark.slow
def test_simulated_kernel_in_bfloat16_at_threshold_zero():
    x, spec = problem(LARGE, 0.0, jnp.bfloat16)
    want = jax.jit(functools.partial(reference.attend, spec=spec))(x)
    assert_same(tpu.attend(x, spec, interpret=pltpu.InterpretParams()), want, 2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exports_for_tpu(case, dtype):
    x, spec = problem(case, 0.02, dtype)
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    exported = jax.export.export(jax.jit(functools.partial(tpu.attend, spec=spec)), platforms=["tpu"])(avals)
    assert exported.mlir_module().count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiles_for_tpu(case, dtype, topology, monkeypatch):
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    x, spec = problem(case, 0.02, dtype)
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    f = jax.jit(functools.partial(tpu.attend, spec=spec), in_shardings=sharding, out_shardings=sharding)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where lowering asks for the kind of TPU
        lowered = f.trace(avals).lower(lowering_platforms=("tpu",))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**24


def test_tpu_is_the_default_on_tpu():
    x, spec = problem(LARGE, 0.02, jnp.bfloat16)
    assert api.choose(spec, x, api.preference()["tpu"]) == ("tpu", {})


def test_refusals_say_why():
    x, spec = problem(LARGE, 0.02)
    narrow = x._replace(q=x.q[..., :64], k=x.k[..., :64], v=x.v[..., :64])
    assert "heads of 64 dimensions" in tpu.refuse(spec, narrow)
    assert "multiples of 16 and 128" in tpu.refuse(Spec(380, 128, 64, 64), x)
    assert "float16" in tpu.refuse(spec, x._replace(q=x.q.astype(jnp.float16)))
    assert "MiB of VMEM" in tpu.refuse(Spec(1 << 17, 1 << 15, 128, 128), x)
