"""The claims of the baselines on the trained model that ships with the package, scanned so that one block is compiled."""

import jax
import pytest

from jaxcomp.core.apply import compressed
from jaxcomp.core.calibrate import Calibration
from jaxcomp.core.leaf import materialise_tree
from jaxcomp.core.transform import chain, compress
from jaxcomp.data import embedded_text, load_embedded, token_windows
from jaxcomp.evaluate.perplexity import perplexity
from jaxcomp.models.llama import Llama, stack_layers
from jaxcomp.models.outliers import inject_outliers
from jaxcomp.quantize import awq, gptq, rtn, smoothquant


class Trial:
    """Perplexity after compression; `windows` of 128 tokens for calibration and as many for evaluation."""

    def __init__(self, windows, outliers=False):
        config, params, tokenizer = load_embedded()
        tokens = lambda split: token_windows(tokenizer.encode(embedded_text(split)).ids, 128)[:windows]
        model = Llama(config, scan_layers=True)
        params = inject_outliers(config, params, jax.random.key(0)) if outliers else params
        self.params, self.held_out = stack_layers(params), tokens("validation")
        self.model = lambda p, x: model.apply({"params": p}, x)
        self.compressed = compressed(self.model)
        self.data = Calibration(self.model, tokens("calibration").reshape(4, -1, 128))

    def __call__(self, transform, dense=True):
        """Perplexity after `transform`; weight-only methods run `dense`, with the values of their leaves, to compile less."""
        params = compress(transform, self.params, self.data)[0]
        apply, params = (self.model, materialise_tree(params)) if dense else (self.compressed, params)
        return perplexity(apply, params, self.held_out, batch_size=16).ppl


@pytest.fixture(scope="module")
def plain():
    return Trial(32)


@pytest.fixture(scope="module")
def with_outliers():
    return Trial(32, outliers=True)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding(plain, bits):
    assert plain(gptq(bits)) < plain(rtn(bits))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_smoothquant_beats_rounding_with_quantized_activations(with_outliers, bits):
    quantizer = rtn(bits, act_bits=bits)
    smoothed = with_outliers(chain(smoothquant(), quantizer), dense=False)
    assert smoothed < with_outliers(quantizer, dense=False)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_orders_hold_on_more_data(bits, group_size):
    trial = Trial(128)
    shared = dict(group_size=group_size, symmetric=False)
    float_ppl, plain_ppl = trial(chain()), trial(rtn(bits, **shared))
    for method in (gptq(bits, **shared), awq(bits, **shared)):
        assert float_ppl < trial(method) < plain_ppl
