"""Perplexity against an independent float64 computation; padding, compilation, compressed leaves, meshes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxcomp.core.apply import compressed
from jaxcomp.evaluate.perplexity import perplexity
from jaxcomp.formats.low_rank import LowRankArray

VOCAB, LENGTH = 11, 6


def apply(params, tokens):
    """A bigram model: logits are a row of a table times a matrix."""
    return jnp.take(params["table"], tokens, axis=0) @ params["head"]


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(VOCAB, 4)).astype(np.float32),
        "head": 2 * rng.normal(size=(4, VOCAB)).astype(np.float32),
    }
    windows = rng.integers(VOCAB, size=(7, LENGTH), dtype=np.int32)
    return jax.tree.map(jnp.asarray, params), windows


def reference(params, windows):
    """(nll per window, hits per window) token by token in float64 numpy."""
    table, head = (np.asarray(params[name], np.float64) for name in ("table", "head"))
    nll, hits = np.zeros(len(windows)), np.zeros(len(windows), int)
    for i, window in enumerate(windows):
        for token, target in itertools.pairwise(window):
            p = np.exp(table[token] @ head)
            nll[i] -= np.log(p[target] / p.sum())
            hits[i] += p.argmax() == target
    return nll, hits


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_equals_reference_for_every_padding(model, batch_size):
    params, windows = model
    nll, hits = reference(params, windows)
    result = perplexity(apply, params, windows, batch_size)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-6)
    np.testing.assert_array_equal(result.correct, hits)
    assert result.nll.dtype == np.float64
    assert result.tokens == 7 * (LENGTH - 1)
    np.testing.assert_allclose(result.ppl, np.exp(nll.sum() / result.tokens), rtol=1e-6)
    np.testing.assert_allclose(result.accuracy, hits.sum() / result.tokens)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(model):
    _, windows = model
    uniform = perplexity(lambda params, tokens: jnp.zeros((*tokens.shape, VOCAB)), {}, windows)
    np.testing.assert_allclose(uniform.ppl, VOCAB, rtol=1e-6)


def test_wrong_and_certain_model_overflows_to_inf_not_to_an_error():
    windows = np.zeros((1, 3), np.int32)
    certain = perplexity(lambda params, tokens: jnp.full((*tokens.shape, 2), 0.0).at[..., 1].set(1e4), {}, windows)
    assert certain.ppl == np.inf and certain.accuracy == 0.0


def test_half_precision_logits_are_scored_in_float32(model):
    params, windows = model
    result = perplexity(lambda p, t: apply(p, t).astype(jnp.bfloat16), params, windows)
    exact = perplexity(apply, params, windows)
    np.testing.assert_allclose(result.ppl, exact.ppl, rtol=2e-2)


def test_compiles_once_over_batches_and_calls(model):
    params, windows = model
    traces = []

    def counted(params, tokens):
        traces.append(tokens.shape)
        return apply(params, tokens)

    perplexity(counted, params, windows, batch_size=3)
    perplexity(counted, params, windows[:4], batch_size=3)
    assert traces == [(3, LENGTH)]


def test_compressed_leaves(model):
    params, windows = model
    leaf = LowRankArray.of(params["head"], rank=2, key=jax.random.key(0), contract_axes=(0,))
    leaf = dataclasses.replace(leaf, up=jax.random.normal(jax.random.key(1), leaf.up.shape))
    found = perplexity(compressed(apply), params | {"head": leaf}, windows)
    dense = perplexity(apply, params | {"head": leaf.materialise()}, windows)
    np.testing.assert_allclose(found.nll, dense.nll, rtol=1e-5)
    assert abs(dense.ppl / perplexity(apply, params, windows).ppl - 1) > 0.01, "the update must matter"


def test_sharded_equals_single_device(model):
    params, windows = model
    mesh = Mesh(np.reshape(jax.devices()[:8], (4, 2)), ("data", "model"))
    shardings = []

    def spy(p, tokens):
        jax.debug.inspect_array_sharding(tokens, callback=shardings.append)
        return apply(p, tokens)

    result = perplexity(spy, params, windows, batch_size=8, mesh=mesh)
    np.testing.assert_allclose(result.nll, perplexity(apply, params, windows).nll, rtol=1e-6)
    assert shardings[0].shard_shape((8, LENGTH)) == (2, LENGTH)


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (5,)])
def test_bad_windows_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"expected \[n >= 1, length >= 2\] tokens, found"):
        perplexity(apply, model[0], np.zeros(shape, np.int32))


def test_batch_must_divide_over_the_mesh(model):
    params, windows = model
    devices = np.array(jax.devices()[:8])
    with pytest.raises(ValueError, match="batch_size 12 must be a multiple of the mesh axis 'data'"):
        perplexity(apply, params, windows, batch_size=12, mesh=Mesh(devices, "data"))
    with pytest.raises(ValueError, match="mesh axis 'data'"):
        perplexity(apply, params, windows, mesh=Mesh(devices, "model"))
