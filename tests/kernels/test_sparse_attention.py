"""Sparse attention on CPU: every implementation against dense attention and the reference, stops, statistics, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_problems import CASES, Case, arrays, dense_attention, options, orders

from pallas_kernels import native
from pallas_kernels.sparse_attention import (
    api,
    cpu_ffi,
    density,
    key_order,
    omitted_bound,
    prefix_blocks,
    sparse_attention,
)

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
IMPLEMENTATIONS = ["reference", "xla", pytest.param("cpu_ffi", marks=needs_compiler)]


@functools.cache
def program(case: Case, implementation: str | None):
    """(q, k, v, threshold) -> (out, stats), ranking included."""

    def run(q, k, v, threshold):
        order, places = orders(q, k, case)
        static = {"query_order": places, "implementation": implementation} | options(case)
        return sparse_attention(q, k, v, order, threshold=threshold, **static)

    return jax.jit(run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_threshold_zero_is_dense_attention(case, implementation):
    q, k, v = arrays(case)
    out, stats = program(case, implementation)(q, k, v, 0.0)
    want, lse = dense_attention(q, k, v, case)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(stats.lse, lse, atol=1e-5)
    assert np.all(np.asarray(stats.blocks) <= np.asarray(stats.total)[..., None])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_early_stops_are_those_of_the_reference(case, implementation):
    q, k, v = arrays(case)
    saved = []
    for threshold in (0.02, 0.1, 0.3):
        want, expected = program(case, "reference")(q, k, v, threshold)
        out, stats = program(case, implementation)(q, k, v, threshold)
        np.testing.assert_array_equal(stats.blocks, expected.blocks)
        np.testing.assert_allclose(stats.gain, expected.gain, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(out, want, atol=1e-5)
        saved.append(int(stats.total.sum() * stats.blocks.shape[-1] - stats.blocks.sum()))
    assert saved == sorted(saved) and saved[-1] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_bfloat16(implementation):
    case = Case()
    q, k, v = arrays(case, jnp.bfloat16)
    out, _ = program(case, implementation)(q, k, v, 0.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), dense_attention(q, k, v, case)[0], atol=2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [0, 1, 31])
def test_short_sequences(length, implementation):
    case = Case(length=length, keys=length, guide="none")
    q, k, v = (jnp.ones((h, length, 16)) * 0.5 for h in (4, 2, 2))
    order = jnp.zeros((4, -(-length // case.segment), 1), jnp.int32)
    out, stats = sparse_attention(q, k, v, order, threshold=0.1, implementation=implementation, **options(case))
    np.testing.assert_allclose(out, np.full(q.shape, 0.5), atol=1e-6)
    assert not np.any(stats.blocks) and stats.lse.shape == (4, length)


def test_any_order_of_a_full_list_gives_the_same_result():
    case = Case(guide="none")
    q, k, v = arrays(case)
    order = np.asarray(key_order(q, k, segment=32))
    mixed = order.copy()
    for m in range(1, order.shape[1]):
        mixed[:, m, : 32 * m] = np.random.default_rng(m).permuted(order[:, m, : 32 * m], axis=-1)
    f = jax.jit(lambda o: sparse_attention(q, k, v, o, threshold=0.0, implementation="xla", **options(case))[0])
    np.testing.assert_allclose(f(jnp.asarray(mixed)), f(jnp.asarray(order)), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_omitted_makes_the_error(implementation):
    """o - o' = e (v' - o') with e the omitted mass of a row and v' its mean value (elementary identity), e from the two `lse`."""
    case = Case(guide="none")
    q, k, v = arrays(case)
    run = program(case, implementation)
    (full, every), (out, stats) = run(q, k, v, 0.0), run(q, k, v, 0.1)
    omitted = 1 - np.exp(np.asarray(stats.lse) - np.asarray(every.lse))
    error = np.linalg.norm(np.asarray(full) - np.asarray(out), axis=-1)
    reach = 2 * np.linalg.norm(np.asarray(v), axis=-1).max()
    assert np.all(error <= omitted * reach + 1e-5) and omitted.max() > 0.05
    assert omitted.min() > -1e-6


def test_bound_holds_where_gains_fall():
    """Identical rows and keys of falling score: the mass left behind is below R g / (1 + R g)."""
    case = Case(1, 1, 128, 128, block_q=32, guide="none")
    q = jnp.ones((1, 128, 16))
    k = jnp.repeat(-0.05 * jnp.arange(128.0)[None, :, None], 16, 2)
    v = jnp.ones_like(k)
    run = program(case, "xla")
    (_, every), (_, stats) = run(q, k, v, 0.0), run(q, k, v, 0.05)
    omitted = (1 - np.exp(np.asarray(stats.lse) - np.asarray(every.lse))).reshape(1, 4, 32).max(-1)
    bound = np.asarray(omitted_bound(stats))[..., 0]
    assert np.any(omitted > 1e-4) and np.all(omitted <= bound + 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation):
    """With threshold 0 a token changes no earlier row; otherwise no row of an earlier segment."""
    case = Case(length=160, keys=160)
    q, k, v = arrays(case)
    at = 100
    changed = tuple(a.at[:, at].add(3.0) for a in (q, k, v))
    run = program(case, implementation)
    for threshold, first in ((0.0, at), (0.1, at // case.segment * case.segment)):
        before, after = run(q, k, v, threshold)[0], run(*changed, threshold)[0]
        np.testing.assert_allclose(after[:, :first], before[:, :first], atol=1e-6)
        assert np.abs(np.asarray(after - before))[:, at:].max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefill_in_chunks_is_prefill_at_once(implementation):
    case = Case(length=160, keys=160)
    q, k, v = arrays(case)
    whole, stats = program(case, implementation)(q, k, v, 0.1)
    first, counts = program(case._replace(length=96, keys=96), implementation)(q[:, :96], k[:, :96], v[:, :96], 0.1)
    second, more = program(case._replace(length=64, start=96), implementation)(q[:, 96:], k, v, 0.1)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)
    np.testing.assert_array_equal(jnp.concatenate([counts.blocks, more.blocks], 1), stats.blocks)


def test_vmap_stops_every_example_on_its_own():
    case = Case(2, 1, 96, 96)
    problems = [arrays(case, seed=s) for s in range(2)]
    problems[1] = tuple(0.01 * a for a in problems[1])  # flat attention, which does not stop
    run = program(case, "xla")
    _, stats = jax.vmap(lambda *a: run(*a, 0.1))(*(jnp.stack(a) for a in zip(*problems, strict=True)))
    alone = [run(*p, 0.1)[1].blocks for p in problems]
    np.testing.assert_array_equal(stats.blocks, jnp.stack(alone))
    assert alone[0].sum() < alone[1].sum()


def test_limits_cut_lists():
    case = Case(guide="none")
    q, k, v = arrays(case)
    order = key_order(q, k, segment=32)
    f = lambda share: prefix_blocks(q, k, order, segment=32, block_k=8, share=share)
    none, some, all_ = f(1.0), f(0.3), f(0.0)
    assert not np.any(none) and np.all(none <= some) and np.all(some <= all_) and np.any((none < some) & (some < all_))
    np.testing.assert_array_equal(all_, np.broadcast_to([0, 4, 8, 12, 16], (4, 5)))
    _, stats = sparse_attention(q, k, v, order, threshold=0.0, limit=some, implementation="xla", **options(case))
    np.testing.assert_array_equal(stats.blocks, np.repeat(np.asarray(some)[..., None], 2, -1))


def test_density_counts_pairs():
    case = Case(length=160, keys=160)
    q, k, v = arrays(case)
    sizes = {"segment": 32, "block_q": 16, "block_k": 8}
    count = lambda threshold: density(program(case, "xla")(q, k, v, threshold)[1], length=160, **sizes)
    np.testing.assert_allclose(count(0.0), 1.0, rtol=1e-6)
    _, stats = program(case, "xla")(q, k, v, 0.1)
    want = (np.asarray(stats.blocks).sum((1, 2)) * 16 * 8 + 5 * 3 * 256) / (10 * 11 / 2 * 256)
    np.testing.assert_allclose(count(0.1), want, rtol=1e-6)


@needs_compiler
def test_compiled_kernel_is_the_default_once_built():
    cpu_ffi.build()
    assert api.preference()["cpu"] == ("cpu_ffi", "xla")
    case = Case()
    lowered = program(case, None).lower(*arrays(case), 0.0)
    assert cpu_ffi._TARGET in lowered.as_text()


def test_no_gradient():
    case = Case()
    q, k, v = arrays(case)
    with pytest.raises(NotImplementedError, match="train with dense attention"):
        jax.grad(lambda q: program(case, "xla")(q, k, v, 0.0)[0].sum())(q)


def test_errors_say_what_was_expected():
    q, k, v = arrays(Case())
    call = functools.partial(sparse_attention, segment=32, block_q=16, block_k=8, threshold=0.1)
    order = jnp.zeros((4, 5, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"expected int32 \[4 or 2, 5, L\].*key_order"):
        call(q, k, v, order[:, :4])
    with pytest.raises(ValueError, match="Hk a divisor of Hq"):
        call(q[:3], k, v, order)
    with pytest.raises(ValueError, match="holds the history"):
        call(q, k[:, :100], v[:, :100], order)
    with pytest.raises(ValueError, match="block_q=24 must divide segment=32"):
        call(q, k, v, order, block_q=24)
    with pytest.raises(ValueError, match=r"threshold=1.5: expected a share in \[0, 1\)"):
        call(q, k, v, order, threshold=1.5)
    with pytest.raises(ValueError, match="stop='tau'"):
        call(q, k, v, order, stop="tau")
    with pytest.raises(ValueError, match=r"query_order: expected \(4, 5, 32\)"):
        call(q, k, v, order, query_order=jnp.zeros((4, 5, 16), jnp.int32))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; known: "):
        call(q, k, v, order, implementation="cuda")
    with pytest.raises(ExceptionGroup) as caught:
        call(q, k, v, order, implementation=["triton", "tpu"])
    assert "8 block_k" in str(caught.value.exceptions[0]) and "16 dimensions" in str(caught.value.exceptions[1])
