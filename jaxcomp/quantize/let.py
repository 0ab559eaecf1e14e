"""Learnable equivalent transformations of a decoder block: rescalings between neighbouring operations that keep its function."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxcomp.models.llama_config import LlamaConfig
from jaxcomp.quantize.smoothquant import smoothing_scale

NAMES = ("qkv", "fc1", "out", "fc2", "qkt")
READERS = {"qkv": ("attn_norm", ("attn/q", "attn/k", "attn/v")), "fc1": ("mlp_norm", ("mlp/gate", "mlp/up"))}
INPUTS = {"qkv": "attn/q/kernel", "fc1": "mlp/up/kernel", "out": "attn/o/kernel", "fc2": "mlp/down/kernel"}
Tree = dict[str, Any]
Stats = Mapping[str, Mapping[str, jax.Array]]


class Equivalence(Protocol):
    """A family of rewrites of a block that keep its function; hashable. `needs`: statistics of the inputs of `INPUTS`."""

    needs: tuple[str, ...]

    def init(self, config: LlamaConfig, block: Tree, stats: Stats) -> dict[str, Any]:
        """Initial parameters of a float32 block, by groups of one learning rate: {"let": ...}."""

    def apply(self, config: LlamaConfig, block: Tree, theta: Mapping[str, Any]) -> Tree:
        """The rewritten block."""


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """Vectors s of OmniQuant and ABQ-LLM (arXiv 2308.13137 eq. 3-5; 2408.08554), SmoothQuant's at first.

    qkv: attn_norm / s, q, k, v * s. fc1: mlp_norm / s, gate, up * s. out: rows of v / s, o * s (per key-value head, repeated
    over its query heads). fc2: rows of up / s, down * s. qkt: rows of q / s, of k * s.

    Departures from the authors' code, which keep the function exact or follow SmoothQuant: s starts from the maximum over all
    weights and query heads that share it, not from one of them; qkt is tied.

    Attributes:
      names: which of the five.
      alpha: SmoothQuant's; 0 leaves the difficulty to activations, 1 to weights.
      tie_rotary: one qkt scale per rotated pair. Untied ones do not commute with the rotary embedding and change the function.
      shift: also moves the middle of v's channels into the bias of o, (v - d) / s; exact because attention weights sum to one.
        Norms without bias leave no place for shifts elsewhere.
    """

    names: tuple[str, ...] = NAMES
    alpha: float = 0.5
    tie_rotary: bool = True
    shift: bool = False

    def __post_init__(self):
        if unknown := sorted(set(self.names) - set(NAMES)):
            raise ValueError(f"unknown transforms {unknown}; known are {NAMES}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that `init` reads."""
        return ("max_abs", *(("max_value", "min_value") if self.shift else ()))

    def init(self, config: LlamaConfig, block: Tree, stats: Stats) -> dict[str, Any]:
        """SmoothQuant's scales, ones for qkt, the middle of the range for shifts: {"let": {name: float32}}."""
        let = {name: smooth_init(config, block, stats, name, self.alpha) for name in self.names if name != "qkt"}
        if "qkt" in self.names:
            heads = 1 if config.traits.qk_norm else config.num_kv_heads
            let["qkt"] = jnp.ones((heads, config.head_dim // (2 if self.tie_rotary else 1)))
        if self.shift:
            let["shift"] = _middle(config, block, stats[INPUTS["out"]])
        return {"let": let}

    def apply(self, config: LlamaConfig, block: Tree, theta: Mapping[str, Any]) -> Tree:
        """`let_apply` of theta["let"]."""
        return let_apply(config, block, theta["let"])


def truncate(s: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """s with |s| at least 1e-2, sign kept (+ for 0), identity gradient."""
    floor = jnp.where(s < 0, -1e-2, 1e-2).astype(s.dtype)
    return s + jax.lax.stop_gradient(jnp.where(jnp.abs(s) < 1e-2, floor, s) - s)


def let_apply(config: LlamaConfig, block: Tree, let: Mapping[str, Float[Array, "..."]]) -> Tree:
    """Rewrites a dense block by the transforms present in `let`; the function stays the same for any values.

    Shapes: qkv, fc1 [D]; fc2 [F]; out, shift [K, d]; qkt [K, d/2] tied or [K, d] untied, K = 1 where q and k are normalised (the
    scales then go into the gains of those norms). Kernels are [in, out].
    """
    flat = flatten_dict(block, sep="/")
    offset = 1.0 if config.traits.gemma else 0.0
    s = {name: truncate(value) for name, value in let.items() if name != "shift"}
    for name, (norm, readers) in READERS.items():
        if name in s:
            scale_gain(flat, norm, 1 / s[name], offset)
            for reader in readers:
                scale_inputs(flat, reader, s[name])
    if "fc2" in s:
        scale_outputs(flat, "mlp/up", 1 / s["fc2"])
        scale_inputs(flat, "mlp/down", s["fc2"])
    if "shift" in let:
        flat["attn/v/bias"] -= let["shift"].reshape(-1)
        flat["attn/o/bias"] += over_query_heads(config, let["shift"]) @ flat["attn/o/kernel"]
    if "out" in s:
        scale_outputs(flat, "attn/v", 1 / s["out"].reshape(-1))
        scale_inputs(flat, "attn/o", over_query_heads(config, s["out"]))
    if "qkt" in s:
        _scale_query_key(config, flat, s["qkt"], offset)
    return unflatten_dict(flat, sep="/")


def smooth_init(config: LlamaConfig, block: Tree, stats: Stats, name: str, alpha: float) -> Float[Array, "..."]:
    """SmoothQuant's scale of a transform other than qkt."""
    max_abs = stats[INPUTS[name]]["max_abs"]
    flat = flatten_dict(block, sep="/")
    if name != "out":
        readers = READERS[name][1] if name in READERS else ("mlp/down",)
        return smoothing_scale(max_abs, [flat[f"{reader}/kernel"].T for reader in readers], alpha)
    shape = (config.num_kv_heads, -1, config.head_dim)  # query heads that share a key-value head share its scales
    kernel = jnp.abs(flat[INPUTS[name]]).max(1).reshape(shape).max(1)
    return smoothing_scale(max_abs.reshape(shape).max(1), [kernel[:, None]], alpha)


def over_query_heads(config: LlamaConfig, x: Float[Array, "K d"]) -> Float[Array, "H*d"]:
    """What belongs to a key-value head, repeated for each of its query heads."""
    return jnp.repeat(x, config.num_heads // len(x), axis=0).reshape(-1)


def scale_gain(flat: Tree, norm: str, factor: Float[Array, "D"], offset: float) -> None:
    """Multiplies the effective gain (parameter + offset) of a norm."""
    gain = flat[f"{norm}/scale"]
    flat[f"{norm}/scale"] = (gain + offset) * factor - offset


def scale_inputs(flat: Tree, dense: str, factor: Float[Array, "I"]) -> None:
    """Multiplies the weights that read each input."""
    flat[f"{dense}/kernel"] = flat[f"{dense}/kernel"] * factor[:, None]


def scale_outputs(flat: Tree, dense: str, factor: Float[Array, "O"]) -> None:
    """Multiplies each output, bias included."""
    flat[f"{dense}/kernel"] = flat[f"{dense}/kernel"] * factor[None]
    if f"{dense}/bias" in flat:
        flat[f"{dense}/bias"] = flat[f"{dense}/bias"] * factor


def _scale_query_key(config: LlamaConfig, flat: Tree, s: Float[Array, "K _"], offset: float) -> None:
    s = jnp.concatenate([s, s], axis=-1) if s.shape[-1] == config.head_dim // 2 else s
    if config.traits.qk_norm:
        scale_gain(flat, "attn/q_norm", 1 / s[0], offset)
        scale_gain(flat, "attn/k_norm", s[0], offset)
    else:
        scale_outputs(flat, "attn/q", 1 / over_query_heads(config, s))
        scale_outputs(flat, "attn/k", s.reshape(-1))


def _middle(config: LlamaConfig, block: Tree, stats: Mapping[str, Array]) -> Float[Array, "K d"]:
    if missing := [name for name in ("v", "o") if "bias" not in block["attn"][name]]:
        raise ValueError(
            f"shift=True needs biases on attn/v and attn/o, and this model has none on {missing}; leave it out"
        )
    shape = (config.num_kv_heads, -1, config.head_dim)
    return (stats["max_value"].reshape(shape).max(1) + stats["min_value"].reshape(shape).min(1)) / 2
