"""Every family gives the logits of `transformers`, through the files of either side."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.io.huggingface import load_pretrained, save_pretrained
from jaxcomp.models import Llama, LlamaConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=1024)
GEMMA = dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=24, final_logit_softcapping=7.0)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=900.0),
    sliding_attention=dict(rope_type="default", rope_theta=50.0),
)
FAMILIES = {
    "llama2": ("Llama", {}),
    "llama2-biased": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=500.0))),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN, max_position_embeddings=4096)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=4.0)),
    "gemma3": ("Gemma3", GEMMA | dict(layer_types=ALTERNATING, rope_parameters=GEMMA3_ROPE)),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


@pytest.fixture(params=FAMILIES, scope="module")
def reference(request):
    """A model of `transformers` with random weights, norms and biases included."""
    name, options = FAMILIES[request.param]
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**SIZES | options)).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The folder that `transformers` writes for it."""
    path = tmp_path_factory.mktemp("theirs")
    reference.save_pretrained(path)
    return path


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_logits_equal_those_of_transformers(reference, folder):
    config, params = load_pretrained(folder)
    ours = jax.jit(Llama(config).apply)({"params": params}, jnp.asarray(TOKENS, jnp.int32))
    difference = np.abs(np.asarray(ours) - logits_of(reference)).max()
    print(f"max |logit difference| {difference:.1e}, max |logit| {np.abs(np.asarray(ours)).max():.1f}")
    assert difference <= 1e-4


def test_transformers_loads_what_we_save(reference, folder, tmp_path):
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path, config, params, shard_bytes=20_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(logits_of(again.eval()), logits_of(reference))


def test_config_survives_the_round_trip(folder):
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    again = LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert again == config and hash(again) == hash(config)
