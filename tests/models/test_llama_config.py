"""Configurations: what is refused, and what published files leave out."""

import pytest

from jaxcomp.models import LlamaConfig, Rope

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(family="bert"), "family 'bert' is unknown; use one of llama"),
        (dict(num_layers=0), "num_layers must be a positive int32, found 0"),
        (dict(vocab_size="64"), "vocab_size must be a positive int32, found '64'"),
        (dict(num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(norm_eps=0.0), "norm_eps must be positive"),
        (dict(sliding_window=4), "family 'llama' has no sliding_window"),
        (dict(family="gemma2", sliding_window=-1), "sliding_window must be positive or None"),
        (dict(family="gemma2", layer_types=("full_attention",)), "layer_types has 1 entries, expected 2"),
        (dict(family="gemma2", layer_types=("sliding_attention",) * 2), "sliding_window is None"),
        (dict(family="gemma2", sliding_window=4, layer_types=("local",) * 2), "found ['local']"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError) as error:
        LlamaConfig(**SIZES | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="dynamic"), "'dynamic' is not supported; use one of default, linear, llama3, yarn"),
        (dict(kind="llama3"), "needs original_max_len"),
        (dict(theta=0.0), "must be positive"),
    ],
)
def test_rope_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Rope(**change)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (dict(model_type="mixtral"), "expected a model_type of llama"),
        (dict(model_type="llama"), "vocab_size, hidden_size"),
        (dict(model_type="llama", hidden_act="relu"), "expected activation 'silu', found 'relu'"),
        (dict(model_type="llama", quantization_config={}), "expected a dense checkpoint"),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), "expected a causal decoder"),
    ],
)
def test_from_hf_refuses(hf, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(hf)


def test_from_hf_reads_published_defaults():
    """Fields that the files on the hub leave out or write in their older form."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4)
    gemma = LlamaConfig.from_hf(
        sizes
        | dict(model_type="gemma3_text", sliding_window_pattern=3, rope_scaling=dict(factor=8.0, rope_type="linear"))
    )
    assert gemma.windows == (4096, 4096, None, 4096, 4096, None, 4096) and gemma.tie_embeddings
    assert gemma.rope == Rope(1e6, "linear", 8.0) and gemma.local_rope == Rope(1e4)
    qwen = LlamaConfig.from_hf(sizes | dict(model_type="qwen2", num_key_value_heads=4, sliding_window=9))
    assert qwen.windows == (None,) * 7
    sliding = dict(use_sliding_window=True, sliding_window=9, max_window_layers=5)
    qwen = LlamaConfig.from_hf(sizes | dict(model_type="qwen2", num_key_value_heads=4) | sliding)
    assert qwen.windows == (None,) * 5 + (9, 9)
    llama = LlamaConfig.from_hf(sizes | dict(model_type="llama", rope_theta=5e5, eos_token_id=[1, 2]))
    assert llama.rope == Rope(5e5) and llama.eos_token_id == (1, 2) and llama.num_kv_heads == 4
