"""A packed model computes, bit for bit, what its codes as float32 compute: integer arithmetic is no approximation of its own."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxcomp
from jaxcomp.core.apply import compressed
from jaxcomp.data import embedded_text, load_embedded, token_windows
from jaxcomp.models.llama import Llama, stack_layers
from jaxcomp.models.outliers import inject_outliers
from jaxcomp.quantize import rtn
from jaxcomp.quantize.attention import quantized_attention
from pallas_kernels.arbitrary_bit_matmul import prefer

LAYERS = 2


@pytest.fixture(scope="module")
def decoder():
    """(model with keys and values of 8 bits, params of its first layers with outliers, tokens, calibration)."""
    config, params, tokenizer = load_embedded()
    params = stack_layers(inject_outliers(config, params, jax.random.key(0)))
    params |= {"blocks": jax.tree.map(lambda leaf: leaf[:LAYERS], params["blocks"])}
    config = dataclasses.replace(config, num_layers=LAYERS)
    tokens = token_windows(tokenizer.encode(embedded_text("validation")).ids, 128)[:2]
    model = Llama(config, quantized_attention(8), scan_layers=True)
    apply = lambda params, tokens: model.apply({"params": params}, tokens)
    return apply, params, tokens, jaxcomp.Calibration(apply, tokens[None])


def logits(apply, params, tokens, implementation):
    """Operations are compiled one by one: fused ones may round activations differently."""
    with jax.disable_jit(), prefer(implementation):
        return np.asarray(compressed(apply)(params, tokens))


def test_integer_products_equal_products_of_the_same_codes_in_float32(decoder):
    """Five levels and zero points on both sides; the card of `experiments.arbitrary_bit_matmul` has more schemes."""
    apply, params, tokens, calibration = decoder
    params = jaxcomp.compress(rtn(3, levels=5, act_bits=8, act_symmetric=False), params, calibration)[0]
    found, want = (logits(apply, params, tokens, name) for name in ("xla", "reference"))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * np.abs(want).max())
