"""Configuration of the Llama family of decoders, and its Hugging Face form."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcomp.models.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """What distinguishes one published architecture from Llama.

    `options`: the optional fields of `LlamaConfig` that this architecture knows.
    `hf_defaults`: fields that a `config.json` of this family may leave out.
    `gemma`: norms scale by 1 + scale, embeddings by sqrt(D), and each branch ends with a norm.
    `global_every`: by default every n-th layer is global and the others slide; 0: all slide.
    """

    architecture: str
    options: tuple[str, ...]
    hf_defaults: Mapping[str, Any]
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    global_every: int = 0


_WINDOWS = ("sliding_window", "layer_types")
_GEMMA_OPTIONS = ("attention_bias", *_WINDOWS, "logit_softcap", "query_pre_attn_scalar")
_GEMMA_DEFAULTS = {
    "num_kv_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_embeddings": True,
    "query_pre_attn_scalar": 256,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", ("attention_bias", "mlp_bias"), {"max_len": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        ("sliding_window",),
        {"max_len": 131_072, "num_kv_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _WINDOWS,
        {"max_len": 32_768, "num_kv_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        ("attention_bias", *_WINDOWS),
        {"max_len": 32_768, "num_kv_heads": 32, "head_dim": 128, "sliding_window": 4096},
        qk_norm=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (*_GEMMA_OPTIONS, "attn_softcap"),
        _GEMMA_DEFAULTS | {"max_len": 8192, "attn_softcap": 50.0, "logit_softcap": 30.0},
        activation="gelu_pytorch_tanh",
        gemma=True,
        global_every=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (*_GEMMA_OPTIONS, "local_rope"),
        _GEMMA_DEFAULTS | {"max_len": 131_072},
        activation="gelu_pytorch_tanh",
        qk_norm=True,
        gemma=True,
        global_every=6,
    ),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama, Mistral, Qwen 2/3 or Gemma 2/3 decoder.

    `family`: a key of `FAMILIES`, the `model_type` of Hugging Face; it decides norms, biases and activation.
    `num_kv_heads`: None is num_heads. `head_dim`: None is hidden_size / num_heads.
    `sliding_window`: tokens that a sliding layer sees, itself included; None makes every layer global.
    `layer_types`: "sliding_attention" or "full_attention" per layer; None is the family's pattern.
    `local_rope`: frequencies of the sliding layers; None is `rope`.
    `attention_bias`: biases on q, k, v and o. `attn_softcap`, `logit_softcap`: c of c * tanh(x / c).
    `query_pre_attn_scalar`: queries are divided by its root; None is head_dim.

    Raises:
      ValueError: a field is out of range, unknown to the family, or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    family: str = "llama"
    max_len: int = 4096
    norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    query_pre_attn_scalar: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_heads, 1))
        _validate(self)

    @property
    def traits(self) -> Family:
        """The family's fixed choices."""
        return FAMILIES[self.family]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each layer sees, None for a global layer."""
        types = _default_layer_types(self) if self.layer_types is None else self.layer_types
        return tuple(self.sliding_window if kind == SLIDING else None for kind in types)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the contents of a Hugging Face `config.json`.

        Raises:
          ValueError: the model type or an option is not supported, or a field is missing.
        """
        return _from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a `config.json` that `transformers` and `from_hf` read back."""
        return _to_hf(self)


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
_SIZES = (*_REQUIRED, "num_kv_heads", "head_dim", "max_len")
_OPTIONS = tuple(sorted({option for family in FAMILIES.values() for option in family.options}))
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "sliding_window": "sliding_window",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tie_embeddings": "tie_word_embeddings",
    "attn_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}


def _default_layer_types(config: LlamaConfig) -> tuple[str, ...]:
    if config.sliding_window is None:
        return (FULL,) * config.num_layers
    every = config.traits.global_every
    return tuple(FULL if every and (i + 1) % every == 0 else SLIDING for i in range(config.num_layers))


def _validate(config: LlamaConfig) -> None:
    def check(good: bool, message: str) -> None:
        if not good:
            raise ValueError(f"LlamaConfig: {message}")

    check(config.family in FAMILIES, f"family {config.family!r} is unknown; use one of {', '.join(FAMILIES)}")
    for name in _SIZES:
        value = getattr(config, name)
        check(isinstance(value, int) and 0 < value < 2**31, f"{name} must be a positive int32, found {value!r}")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    check(heads % kv_heads == 0, f"num_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
    even = config.head_dim % 2 == 0 and config.head_dim <= 2**16
    check(even, f"head_dim must be even and at most {2**16}, found {config.head_dim}")
    check(config.norm_eps > 0, f"norm_eps must be positive, found {config.norm_eps}")
    for name in ("sliding_window", "attn_softcap", "logit_softcap", "query_pre_attn_scalar"):
        value = getattr(config, name)
        check(value is None or value > 0, f"{name} must be positive or None, found {value}")
    for name in set(_OPTIONS) - set(config.traits.options):
        check(not getattr(config, name), f"family {config.family!r} has no {name}; choose a family that has")
    scaled = config.local_rope is not None and config.local_rope.kind != "default"
    check(not scaled, "local_rope must be of kind 'default': sliding layers see no long context")
    if config.layer_types is not None:
        found, layers = len(config.layer_types), config.num_layers
        check(found == layers, f"layer_types has {found} entries, expected {layers}; None is the pattern")
        unknown = set(config.layer_types) - {FULL, SLIDING}
        check(not unknown, f"layer_types must be {FULL!r} or {SLIDING!r}, found {sorted(unknown)}")
        endless = SLIDING in config.layer_types and config.sliding_window is None
        check(not endless, "layer_types has sliding layers but sliding_window is None; set it")


def _hf_names(traits: Family) -> dict[str, str]:
    return {name: key for name, key in _HF_NAMES.items() if name in traits.options or name not in _OPTIONS}


def _from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: expected a model_type of {', '.join(FAMILIES)}, found {family!r}")
    traits = FAMILIES[family]
    _refuse_unsupported(hf, traits)
    names = _hf_names(traits)
    fields = dict(traits.hf_defaults) | {name: hf[key] for name, key in names.items() if key in hf}
    missing = [names[name] for name in _REQUIRED if name not in fields]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing; take the file from the model's folder")
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    if family.startswith("qwen") and not hf.get("use_sliding_window", False):
        fields["sliding_window"] = None
    if "layer_types" in traits.options:
        fields["layer_types"] = _layer_types_from_hf(hf, fields)
    return LlamaConfig(family=family, **fields, **_ropes_from_hf(hf, traits))


def _refuse_unsupported(hf: Mapping[str, Any], traits: Family) -> None:
    if "quantization_config" in hf:
        raise ValueError("config.json: found quantization_config, expected a dense checkpoint; dequantize it")
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or traits.activation
    if activation != traits.activation:
        raise ValueError(f"config.json: expected activation {traits.activation!r}, found {activation!r}")
    if hf.get("use_bidirectional_attention"):
        raise ValueError("config.json: found use_bidirectional_attention, expected a causal decoder")


def _layer_types_from_hf(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[str, ...] | None:
    if hf.get("layer_types") is not None:
        return tuple(hf["layer_types"])
    layers = range(fields["num_layers"])
    if fields.get("sliding_window") is None:
        return None
    if hf["model_type"].startswith("qwen"):
        return tuple(SLIDING if i >= hf.get("max_window_layers", 28) else FULL for i in layers)
    if "sliding_window_pattern" in hf:
        return tuple(SLIDING if (i + 1) % hf["sliding_window_pattern"] else FULL for i in layers)
    return None


def _ropes_from_hf(hf: Mapping[str, Any], traits: Family) -> dict[str, Rope]:
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if "local_rope" not in traits.options:
        return {"rope": Rope.from_hf(scaling, hf.get("rope_theta", 10_000.0))}
    full, local = (scaling.get(FULL) or {}, scaling.get(SLIDING) or {}) if FULL in scaling else (scaling, {})
    return {
        "rope": Rope.from_hf(full, hf.get("rope_theta", 1_000_000.0)),
        "local_rope": Rope.from_hf(local, hf.get("rope_local_base_freq", 10_000.0)),
    }


def _to_hf(config: LlamaConfig) -> dict[str, Any]:
    traits = config.traits
    hf = {key: getattr(config, name) for name, key in _hf_names(traits).items()}
    hf |= {"model_type": config.family, "architectures": [traits.architecture]}
    hf["hidden_activation" if traits.gemma else "hidden_act"] = traits.activation
    hf |= {"rope_theta": config.rope.theta, "rope_scaling": config.rope.to_hf()}
    if "local_rope" in traits.options:
        hf["rope_local_base_freq"] = (config.local_rope or config.rope).theta
    if "query_pre_attn_scalar" in traits.options:
        hf["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_dim
    if "layer_types" in traits.options:
        hf["layer_types"] = [FULL if window is None else SLIDING for window in config.windows]
        hf["use_sliding_window"] = config.sliding_window is not None
    return hf
