"""Logits of a whole packed decoder, integer products against float32 products of the same codes."""

from __future__ import annotations

import jax
import numpy as np

import jaxcomp
from experiments.cards import Row
from jaxcomp.core.apply import compressed
from jaxcomp.data import embedded_text, load_embedded, token_windows
from jaxcomp.models import Llama
from jaxcomp.models.llama import stack_layers
from jaxcomp.models.outliers import inject_outliers
from jaxcomp.quantize import rtn
from jaxcomp.quantize.attention import quantized_attention
from pallas_kernels.arbitrary_bit_matmul import api, prefer

SCHEMES = {
    "W2A8": dict(bits=2, act_bits=8, act_symmetric=False),
    "W2*A8": dict(bits=3, levels=5, act_bits=8, act_symmetric=False),
    "W3A8": dict(bits=3, act_bits=8, act_symmetric=False),
    "W4A4": dict(bits=4, act_bits=4, act_symmetric=False),
    "W4A8g128": dict(bits=4, group_size=128, act_bits=8, act_symmetric=False),
    "W6A6": dict(bits=6, act_bits=6, act_symmetric=False),
}
NOTE = (
    "Same codes: weights and activations rounded as in the packed model, then multiplied as float32, which is exact, and scaled; "
    "operations run one by one, so that both round alike. Compiled: the packed model under jit against the same: XLA fuses "
    "and reorders float operations, which moves single activations across a step of their grid. A fake-quantized model in "
    "another order of operations differs by as much."
)


def rows(windows: int = 4, length: int = 256) -> list[Row]:
    """Largest error of a token's logits over the largest logit, for every scheme and implementation of this platform."""
    kv_bits, (config, params, tokenizer) = 8, load_embedded()
    model = Llama(config, quantized_attention(kv_bits), scan_layers=True)
    params = stack_layers(inject_outliers(config, params, jax.random.key(0)))
    tokens = token_windows(tokenizer.encode(embedded_text("validation")).ids, length)[:windows]
    dense = lambda params, tokens: model.apply({"params": params}, tokens)
    calibration, run, found = jaxcomp.Calibration(dense, tokens[None]), compressed(dense), []
    setting = (
        f"logits of the embedded decoder with outliers, {windows} x {length} tokens, keys and values of {kv_bits} bits"
    )
    for scheme_name, scheme in SCHEMES.items():
        packed = jaxcomp.compress(rtn(**scheme), params, calibration)[0]
        got = {name: _eager(run, packed, tokens, name) for name in ("reference", *api.platform_preference())}
        got["compiled"] = np.asarray(jax.jit(run)(packed, tokens))
        want = got.pop("reference")
        for name, logits in got.items():
            value = float(np.abs(logits - want).max() / np.abs(want).max())
            found.append(Row(f"{scheme_name}, {name}", setting, "max_error", "", value, value, value, note=NOTE))
    return found


def _eager(run, params, tokens, implementation: str) -> np.ndarray:
    """Logits by operations that are compiled one by one."""
    with jax.disable_jit(), prefer(implementation):
        return np.asarray(run(params, tokens))
