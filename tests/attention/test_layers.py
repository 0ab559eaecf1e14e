"""An attention per layer, captured inputs, thresholds calibrated per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.attention import apply_attention, calibrate, capture, s2o
from jaxcomp.attention.heads import synthetic_head
from jaxcomp.models import Llama, LlamaConfig, dot_product_attention
from jaxcomp.models.llama import stack_layers

CONFIG = LlamaConfig(61, 32, 48, 2, 4, num_kv_heads=2, head_dim=8, max_len=128)
SIZES = dict(segment=16, block_q=16, block_k=16)


@pytest.fixture(scope="module")
def decoder():
    tokens = jax.random.randint(jax.random.key(1), (1, 96), 0, 61)
    return Llama(CONFIG), Llama(CONFIG).init(jax.random.key(0), tokens)["params"], tokens


def test_every_layer_has_its_own_attention_and_reports(decoder):
    model, params, tokens = decoder
    methods = [s2o(threshold=t, guide="none", **SIZES).attend for t in (0.0, 0.9)]
    run = jax.jit(lambda p, t: apply_attention(model, methods, {"params": p}, t))
    _, (first, second) = run(params, tokens)
    assert (first.density == 1).all() and (second.density < 1).all() and first.density.shape == (1, 4)


def test_exact_attention_changes_nothing(decoder):
    model, params, tokens = decoder
    logits, _ = jax.jit(lambda p: apply_attention(model, s2o(threshold=0.0, **SIZES).attend, {"params": p}, tokens))(
        params
    )
    np.testing.assert_allclose(logits, jax.jit(model.apply)({"params": params}, tokens), atol=1e-4)


def test_captured_inputs_reproduce_the_output(decoder):
    model, params, tokens = decoder
    _, records = jax.jit(lambda p: apply_attention(model, capture(dot_product_attention), {"params": p}, tokens))(
        params
    )
    assert [[x.shape for x in record] for record in records] == [[(1, 96, 4, 8), (1, 96, 2, 8), (1, 96, 2, 8)]] * 2


def test_wrong_numbers_of_layers_are_refused(decoder):
    model, params, tokens = decoder
    attend = s2o(threshold=0.0, **SIZES).attend
    with pytest.raises(ValueError, match="1 attentions, but there is a layer 1"):
        apply_attention(model, [attend], {"params": params}, tokens)
    with pytest.raises(ValueError, match="3 attentions for 2 layers"):
        apply_attention(model, [attend] * 3, {"params": params}, tokens)
    with pytest.raises(ValueError, match="unstack the layers"):
        apply_attention(model.clone(scan_layers=True), attend, {"params": stack_layers(params)}, tokens)


def test_calibration_meets_the_target_head_by_head():
    heads = [synthetic_head(kind, 512, 0) for kind in ("vertical", "slash")]
    q, k, v = (jnp.stack(parts, 1)[None] for parts in zip(*heads, strict=True))
    thresholds = (0.3, 0.1, 0.03, 0.01, 0.003)
    method_of = lambda t: s2o(threshold=t, segment=32, block_q=16, block_k=16)
    found = calibrate(method_of, thresholds, q, k, v, 0.02)
    assert (found.error <= 0.02).all() and (found.density < 0.9).all()
    assert found.density[0] < found.density[1]  # columns are easier than a moving diagonal
    strict = calibrate(method_of, thresholds, q, k, v, 1e-9)  # out of reach: the most exact
    np.testing.assert_allclose(strict.threshold, 0.003, rtol=1e-6)
    _, stats = jax.jit(method_of(found.threshold).attend)(q, k, v)
    np.testing.assert_allclose(stats.density[0], found.density, rtol=1e-5)
    with pytest.raises(ValueError, match="positive target"):
        calibrate(method_of, thresholds, q, k, v, 0.0)


def test_a_budget_is_calibrated_like_a_gain():
    q, k, v = (jnp.asarray(x)[None, :, None] for x in synthetic_head("vertical", 256, 0))
    method_of = lambda share: s2o(threshold=share, stop="budget", **SIZES)
    found = calibrate(method_of, (0.9, 0.1), q, k, v, 0.02)
    assert found.threshold[0] == np.float32(0.1) and found.error[0] <= 0.02 and found.density[0] < 1
