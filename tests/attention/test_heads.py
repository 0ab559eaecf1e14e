"""Structured heads have the structure that they are named for, and S2O finds it."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from jaxcomp.attention import baselines, s2o
from jaxcomp.attention.heads import KINDS, SINKS, spans, synthetic_head


def needed(mass, share=0.95):
    """Share of entries that hold most of the mass."""
    ordered = np.sort(mass.ravel())[::-1]
    return (np.cumsum(ordered) < share * ordered.sum()).sum() / len(ordered)


@pytest.mark.parametrize("kind", KINDS)
def test_mass_lies_on_few_keys_but_many_tiles(kind):
    q, k, _ = synthetic_head(kind, 1024, 0)
    p = naive.softmax(np.where(naive.causal(1024), q @ k.T / 8, -np.inf))
    below = np.tril_indices(1024)
    tiles = p.reshape(16, 64, 16, 64).sum((1, 3))[np.tril_indices(16)]
    assert needed(p[below]) < 0.25 < needed(tiles)


def test_heads_are_reproducible_and_differ_by_kind_and_seed():
    first, again = (synthetic_head("mixed", 256, 3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(first.query, synthetic_head("mixed", 256, 4).query)
    assert np.abs(first.value[:SINKS]).max() < 0.3 < np.abs(first.value[SINKS:]).max()
    with pytest.raises(ValueError, match="stripe"):
        synthetic_head("diagonal", 256, 0)


def test_spans_cover_the_sequence():
    sizes = np.bincount(spans(np.random.default_rng(0), 5000))
    assert sizes.sum() == 5000 and (sizes[:-1] >= 100).all() and (sizes < 600).all()


def error_at(curve, density):
    """Interpolated between logarithms."""
    ordered = sorted(curve)
    assert ordered[0][0] < density < ordered[-1][0]
    return np.exp(np.interp(np.log(density), *np.log(np.array(ordered).T)))


def errors(head, methods, density=0.2):
    q, k, v = (jnp.asarray(x)[:, None] for x in head)
    exact = naive.attend(*head, naive.causal(len(head.query)))
    out = {}
    for name, (method_of, thresholds) in methods.items():
        run = jax.jit(lambda t, method_of=method_of: method_of(t).attend(q, k, v))
        results = [run(t) for t in thresholds]
        curve = [(float(s.density[0]), float(((o[:, 0] - exact) ** 2).mean())) for o, s in results]
        out[name] = error_at(curve, density)
    return out


@pytest.mark.parametrize("kind", ["vertical", pytest.param("topic", marks=pytest.mark.slow), "stripe"])
def test_s2o_errs_less_than_block_methods_at_equal_density(kind):
    shares = (0.1, 0.3, 0.5, 0.7, 0.85)
    methods = {
        "s2o": (lambda t: s2o(threshold=t, segment=64, block_q=32, block_k=32), (0.2, 0.08, 0.03, 0.01)),
        "pbs": (lambda t: baselines.pbs(t, segment=128, block=32), shares),
        "xattention": (lambda t: baselines.xattention(t, block=32), shares),
    }
    found = errors(synthetic_head(kind, 2048, 0), methods)
    assert found["pbs"] > 2.5 * found["s2o"] and found["xattention"] > 2.5 * found["s2o"]


def test_query_permutation_pays_on_stripes():
    sizes = dict(segment=128, block_q=32, block_k=32)
    gains = (0.2, 0.08, 0.03, 0.01)
    methods = {g: (lambda t, g=g: s2o(threshold=t, guide=g, **sizes), gains) for g in ("anti_sink", "none")}
    found = errors(synthetic_head("stripe", 2048, 0), methods)
    assert found["none"] > 1.3 * found["anti_sink"]
