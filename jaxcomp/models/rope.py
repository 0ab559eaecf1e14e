"""Rotary position embedding and its context extensions (Su et al., 2021, arXiv 2104.09864)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_len", "beta_fast", "beta_slow", "attention_factor"),
}
_HF_NAMES = {
    "theta": "rope_theta",
    "kind": "rope_type",
    "original_max_len": "original_max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies of one kind of layer.

    `kind`: "default"; "linear": frequencies divided by `factor`; "llama3": only the slow ones, with a ramp
    from `low_freq_factor` to `high_freq_factor` turns per original context; "yarn": likewise, with a ramp
    over dimensions between `beta_slow` and `beta_fast` turns (Peng et al., 2023, arXiv 2309.00071, section 3.2).
    `original_max_len`: tokens of the pre-training context, needed by "llama3" and "yarn".
    `attention_factor`: amplitude of "yarn"; None is the paper's 0.1 ln(factor) + 1.

    Raises:
      ValueError: unknown kind, or a field that the kind needs is missing or not positive.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(f"rope kind {self.kind!r} is not supported; use one of {', '.join(_KINDS)}")
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope theta and factor must be positive, found {self.theta} and {self.factor}")
        if "original_max_len" in _KINDS[self.kind] and not self.original_max_len:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_len, the pre-training context length")

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin; 1 except for "yarn"."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], theta: float) -> "Rope":
        """Reads `rope_parameters` or `rope_scaling` of a `config.json`; `theta` where it has no `rope_theta`.

        Raises:
          ValueError: an option is not supported.
        """
        if hf.get("partial_rotary_factor", 1.0) != 1.0 or hf.get("mscale") or not hf.get("truncate", True):
            raise ValueError(f"rope: expected no partial_rotary_factor, mscale or truncate, found {dict(hf)}")
        hf = {"rope_theta": theta, "rope_type": hf.get("type", "default")} | dict(hf)
        keys = {field.name: _HF_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: hf[key] for name, key in keys.items() if hf.get(key) is not None})

    def to_hf(self) -> dict[str, Any] | None:
        """`rope_scaling` of a `config.json`, without `theta`; None for the default kind."""
        if self.kind == "default":
            return None
        names = [name for name in ("kind", *_KINDS[self.kind]) if getattr(self, name) is not None]
        return {_HF_NAMES.get(name, name): getattr(self, name) for name in names}


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each rotated pair: f32[head_dim / 2], in radians."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kept = {"default": lambda *_: 1.0, "linear": lambda *_: 0.0, "llama3": _llama3_kept, "yarn": _yarn_kept}
    share = kept[rope.kind](rope, plain)  # of each frequency that is kept; the rest is divided by factor
    return (share * plain + (1 - share) * plain / rope.factor).astype(np.float32)


def _llama3_kept(rope: Rope, plain: np.ndarray) -> np.ndarray:
    turns = rope.original_max_len * plain / (2 * math.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)


def _yarn_kept(rope: Rope, plain: np.ndarray) -> np.ndarray:
    head_dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    return 1.0 - np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0.0, 1.0)


def rotate(
    x: Float[Array, "B T H d"],
    positions: Int[Array, "#B T"],
    inv_freq: Float[Array, "d/2"],
    amplitude: Float[Array, ""],
) -> Float[Array, "B T H d"]:
    """Turns the pairs (i, i + d/2) of every head by position * inv_freq, in float32; returns x.dtype."""
    angle = positions[:, :, None, None].astype(jnp.float32) * inv_freq[None, None, None, :]
    cos, sin = jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
