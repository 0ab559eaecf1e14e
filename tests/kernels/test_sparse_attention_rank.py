"""Orders of queries and keys against NumPy, whatever the length of the lists; memory that does not grow with N squared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_problems import Case, arrays

from pallas_kernels import native
from pallas_kernels.sparse_attention import cpu_ffi, key_order, query_order
from pallas_kernels.sparse_attention.rank import packed_order

CASE = Case(length=150, keys=150)


def pooled_scores(q, k, segment, heads):
    """float64 [H, M, T]: mean query of a segment and of the heads of a list times every key."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    share = q.shape[0] // heads
    parts = [q[:, i : i + segment].mean(1).reshape(heads, share, -1).mean(1) for i in range(0, q.shape[1], segment)]
    return np.einsum("mhd,htd->hmt", np.stack(parts), np.repeat(k, heads // k.shape[0], 0)) / np.sqrt(q.shape[-1])


@pytest.mark.parametrize("share_group", [False, True])
def test_history_comes_by_falling_score(share_group):
    q, k, _ = arrays(CASE)
    order = np.asarray(jax.jit(lambda q, k: key_order(q, k, segment=32, share_group=share_group))(q, k))
    scores = pooled_scores(q, k, 32, order.shape[0])
    assert order.shape == (2 if share_group else 4, 5, 128)
    for h, m in np.ndindex(*order.shape[:2]):
        listed = order[h, m, : 32 * m]
        np.testing.assert_array_equal(np.sort(listed), np.arange(32 * m))
        assert np.all(np.diff(scores[h, m, listed]) <= np.ptp(scores[h, m]) * 2.0**-20)


def test_lists_behind_a_cache_and_of_everything_else():
    q, k, _ = arrays(CASE)
    whole = key_order(q, k, segment=32)
    rest = q[:, 64:]
    fixed = key_order(rest, k, segment=32, start=64)
    traced = jax.jit(lambda start: key_order(rest, k, segment=32, start=start))(64)
    for m in range(3):
        count = 64 + 32 * m
        np.testing.assert_array_equal(fixed[:, m, :count], whole[:, m + 2, :count])
        np.testing.assert_array_equal(traced[:, m, :count], whole[:, m + 2, :count])
    others = np.asarray(key_order(q, k, segment=32, causal=False))
    for m in range(5):
        own = np.arange(32 * m, min(32 * m + 32, 150))
        np.testing.assert_array_equal(np.sort(others[0, m, : 150 - own.size]), np.setdiff1d(np.arange(150), own))


def test_capped_lists_are_the_first_entries():
    q, k, _ = arrays(CASE)
    np.testing.assert_array_equal(key_order(q, k, segment=32, cap=20)[:, 1:], key_order(q, k, segment=32)[:, 1:, :20])


def test_sub_means_see_what_a_mean_blurs():
    """Half of the rows want one key strongly, the other half dislike it: their mean is indifferent, sub-means are not."""
    q = jnp.concatenate([jnp.zeros((1, 32, 16)), 8.0 * jnp.ones((1, 16, 16)), -8.0 * jnp.ones((1, 16, 16))], 1)
    k = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 16)) * 0.1, jnp.float32).at[:, 17].set(1.0)
    assert int(key_order(q, k, segment=32, pool=16)[0, 1, 0]) == 17
    assert int(key_order(q, k, segment=32)[0, 1, 0]) != 17


def test_guides_put_rows_that_need_history_first():
    q, k, _ = arrays(CASE)
    group = lambda direction: np.repeat(np.asarray(direction), 2, 0)
    guides = {"anti_sink": group(-k[:, :4].mean(1)), "mean_key": group(k.mean(1))}
    for guide, direction in guides.items():
        places = np.asarray(query_order(q, k, segment=32, guide=guide))
        np.testing.assert_array_equal(np.sort(places, -1), np.broadcast_to(np.arange(32), places.shape))
        score = np.einsum("hnd,hd->hn", np.asarray(q), direction)
        assert np.all(np.diff(np.take_along_axis(score[:, :32], places[:, 0], 1), axis=1) <= 1e-4)
        np.testing.assert_array_equal(places[:, -1, 22:], np.broadcast_to(np.arange(22, 32), (4, 10)))  # padding
    assert query_order(q, k, segment=32, guide="none") is None
    assert query_order(q, k, segment=32, guide="mean_query").shape == (4, 5, 32)
    with pytest.raises(ValueError, match="guide='sink'"):
        query_order(q, k, segment=32, guide="sink")


def test_packed_order_keeps_ties_and_extremes():
    score = jnp.asarray([[1.0, 3.0, 3.0, -1e3, 3.0, 2.0]])
    inside = jnp.asarray([[True, True, True, True, True, False]])
    np.testing.assert_array_equal(packed_order(score, inside), [[1, 2, 4, 0, 3, 5]])
    np.testing.assert_array_equal(packed_order(jnp.zeros((1, 4)), jnp.ones((1, 4), bool)), [[0, 1, 2, 3]])


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("t", [1, 2, 7, 600, 5000])
def test_compiled_sort_is_the_sort_of_words(t):
    rng, bits = np.random.default_rng(t), max(t - 1, 1).bit_length()
    rank = rng.integers(0, 2 ** min(32 - bits, 12), (2, 3, t)).astype(np.uint32)  # with ties
    words = rank << np.uint32(bits) | np.arange(t, dtype=np.uint32)
    order = jax.jit(lambda w: jax.vmap(lambda w: cpu_ffi.packed_order(w, bits))(w))(words)
    np.testing.assert_array_equal(order, np.argsort(words, axis=-1, kind="stable"))


def test_memory_of_ranking_is_linear():
    temp = []
    for n in (2048, 8192):
        shape = jax.ShapeDtypeStruct((2, n, 16), jnp.float32)
        lowered = jax.jit(lambda q, k: key_order(q, k, segment=128, cap=256)).lower(shape, shape)
        temp.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert temp[1] < 5 * temp[0]


def test_pool_must_divide_the_segment():
    q, k, _ = arrays(CASE)
    with pytest.raises(ValueError, match="pool=24 must divide segment=32"):
        key_order(q, k, segment=32, pool=24)
