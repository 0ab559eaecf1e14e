"""The C++ kernel, with the machine's vectors and in scalar code, against exact integer products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.arbitrary_bit_matmul import api, arbitrary_bit_matmul, cpu_ffi, pack_dense, prepare, weight_spec
from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared, convert

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=["native", "scalar"])
def kernel(request, kernel_cache):
    """Registers one build of the kernel under a name of its own."""
    with pytest.MonkeyPatch.context() as patch:
        target, library = f"arbitrary_bit_matmul_{request.param}", cpu_ffi.LIBRARY
        ((_, symbol),) = library.handlers
        flags = tuple(f for f in library.flags if request.param == "native" or f != "-march=native")
        patch.setattr(cpu_ffi, "LIBRARY", native.Library(library.source, ((target, symbol),), flags))
        patch.setattr(cpu_ffi, "_TARGET", target)
        jax.clear_caches()
        yield cpu_ffi.matmul
    jax.clear_caches()


def problem(bits, m, n, k, groups=1, levels=0, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, levels or 2**bits, (n, k)).astype(np.uint8)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    scale = jnp.asarray(2.0 ** rng.integers(-2, 3, (n, groups)), jnp.float32)
    packed = pack_dense(codes, bits)
    spec = weight_spec(packed, scale, None, k=k, bits=bits, levels=levels)
    grouped = lambda a: a.reshape(a.shape[0], groups, -1).astype(np.int64)
    partial = np.einsum("mgk,ngk->mng", grouped(x), grouped(codes) - spec.centre)
    return jnp.asarray(x), Prepared(packed, "dense"), scale, spec, (partial * np.asarray(scale, np.float64)).sum(-1)


@needs_compiler
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_exact(kernel, bits):
    for m, n, k, groups in ((1, 5, 45, 1), (3, 9, 200, 1), (5, 66, 256, 2))[bits % 2 :]:
        x, weight, scale, spec, want = problem(bits, m, n, k, groups)
        np.testing.assert_array_equal(kernel(x, weight, scale, spec), want.astype(np.float32))


@needs_compiler
@pytest.mark.parametrize(("group", "groups"), [(4, 9), (8, 8), (16, 21), (32, 3), (192, 2)])
def test_groups_smaller_than_a_vector(kernel, group, groups):
    for bits, m in ((3, 1), (4, 6)):
        x, weight, scale, spec, want = problem(bits, m, 7, group * groups, groups)
        np.testing.assert_array_equal(kernel(x, weight, scale, spec), want.astype(np.float32))


@needs_compiler
@pytest.mark.parametrize("k", [3, 100, 193, 400])
def test_five_levels_in_base_5(kernel, k):
    x, weight, scale, spec, want = problem(3, 2, 7, k, levels=5)
    base5 = convert(weight, ("base5",), spec)
    np.testing.assert_array_equal(kernel(x, base5, scale, spec), want.astype(np.float32))
    assert base5.data.nbytes <= weight.data.nbytes


@needs_compiler
def test_floating_point_rows_gradients_and_vmap(kernel):
    _, weight, scale, _, _ = problem(4, 1, 8, 128)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 128)), jnp.float32)
    f = functools.partial(arbitrary_bit_matmul, packed=weight.data, scale=scale, bits=4)
    native, plain = functools.partial(f, implementation="cpu_ffi"), functools.partial(f, implementation="xla")
    gradient = lambda g: jax.grad(lambda x: (g(x) ** 2).sum())
    results = lambda g: jax.jit(lambda x: (g(x), jax.vmap(g)(x), gradient(g)(x)))(x)
    for got, want in zip(results(native), results(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@needs_compiler
def test_used_by_default_once_built():
    x, weight, scale, spec, _ = problem(4, 1, 8, 128)
    cpu_ffi.build()
    assert api.choose(spec, x, weight.data, api.preference()["cpu"]).name == "cpu_ffi"
    lowered = jax.jit(lambda x: arbitrary_bit_matmul(x, weight.data, scale, bits=4)).lower(jnp.ones((1, 128)))
    assert cpu_ffi._TARGET in lowered.as_text()


def test_refuses_what_xla_does_better():
    _, weight, scale, spec, _ = problem(4, 1, 8, 96, groups=4)
    with pytest.raises(ExceptionGroup) as caught:
        arbitrary_bit_matmul(jnp.ones((1, 96)), weight.data, scale, bits=4, implementation=["cpu_ffi"])
    assert "groups of 24 columns" in str(caught.value.exceptions[0])
    assert "6 rows of float32; it is for at most 5" in cpu_ffi.refuse(spec, jnp.ones((6, 96)))
    assert "17 rows of int8" in cpu_ffi.refuse(spec, jnp.ones((17, 96), jnp.int8))


def test_refuses_a_weight_prepared_for_another():
    _, weight, scale, spec, _ = problem(3, 1, 8, 128, levels=5)
    base5 = prepare(weight.data, k=128, groups=1, bits=3, levels=5, implementation="cpu_ffi")
    assert base5.layout == "base5"
    y = lambda w, name: arbitrary_bit_matmul(jnp.ones((1, 128)), w, scale, bits=3, levels=5, implementation=name)
    np.testing.assert_array_equal(y(base5, "xla"), y(weight.data, "xla"))
    reasons = api.choose(spec, jnp.ones((1, 128)), Prepared(None, "kn_int8"), ["cpu_ffi", "xla"]).reasons
    assert "layout 'kn_int8', expected 'base5' or 'dense'" in reasons["cpu_ffi"]


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, _, _, spec, _ = problem(4, 1, 8, 128)
    assert "no C++ compiler" in cpu_ffi.refuse(spec, jnp.ones((1, 128)))
    with pytest.raises(RuntimeError, match="install g"):
        cpu_ffi.build()
    assert not any(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_failed_compilation_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.cc"
    broken.write_text("int x = ;")
    with pytest.raises(RuntimeError, match="failed with"):
        native.Library(broken, ()).build()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["broken.cc"]
