"""What a learned method does to one block: its recipe, its rounded block as a function of what is learned, its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxcomp.formats import ActivationQuantizer, Grid, Layout, QuantizedArray
from jaxcomp.formats.grid import fake_quantize
from jaxcomp.models import LlamaConfig
from jaxcomp.quantize.attention import BlockRunner
from jaxcomp.quantize.let import Equivalence, Stats, Tree
from jaxcomp.quantize.losses import Objective
from jaxcomp.quantize.lwc import clip_logits, clipped, compensation, nudged
from jaxcomp.quantize.scheme import Scheme
from jaxcomp.quantize.straight_through import balanced

DOWN = "mlp/down/kernel"


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates of AdamW (no weight decay, no schedule) for what a method learns.

    Attributes:
      let: of equivalent transforms.
      clip: of clipping logits.
      compensation: of the rank-one term.
      rounding: of rounding offsets, in steps of the grid.
    """

    let: float = 5e-3
    clip: float = 1e-2
    compensation: float = 1e-2
    rounding: float = 5e-3


RATES = Rates()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a method learns in every block, and how.

    Attributes:
      name: of the method.
      objective: the loss.
      equivalence: function-preserving rewrites that are learned; None for none.
      kv_bits: bits of queries, keys and values in attention; 16 for floating point.
      epochs: passes through the calibration data per block.
      batch_size: sequences per optimisation step.
      compensate: how many blocks at either end get a rank-one term on their down projection.
      bit_balance: 2^b + 1 levels for 1 and 2 bits.
      clip_init: initial logits of weight clipping.
      rounding: learn an offset of every weight, at most half a step of its grid.
      rates: learning rates.
    """

    name: str
    objective: Objective
    equivalence: Equivalence | None
    kv_bits: int
    epochs: int
    batch_size: int = 1
    compensate: tuple[int, int] = (0, 0)
    bit_balance: bool = False
    clip_init: float = 4.0
    rounding: bool = False
    rates: Rates = RATES


@dataclasses.dataclass(frozen=True)
class Student:
    """A block on its grids as a function of what is learned; calling it is the loss. Equal students share a compilation.

    Attributes:
      config: the model's.
      recipe: the method's.
      schemes: (path below the block, scheme) of every kernel that is rounded.
    """

    config: LlamaConfig
    recipe: Recipe
    schemes: tuple[tuple[str, Scheme], ...]

    def init(self, block: Any, stats: Stats, compensate: bool) -> dict[str, Any]:
        """Initial theta."""
        flat = flatten_dict(block, sep="/")
        shape = {path: flat[path].shape[::-1] for path, _ in self.schemes}
        clip = {path: clip_logits(shape[path], self.grid(s), self.recipe.clip_init) for path, s in self.schemes}
        theta = {"clip": unflatten_dict(clip, sep="/")}
        if self.recipe.rounding:
            theta["rounding"] = unflatten_dict({path: jnp.zeros(shape[path]) for path, _ in self.schemes}, sep="/")
        if compensate and DOWN in shape:
            theta["compensation"] = compensation(shape[DOWN])
        equivalence = self.recipe.equivalence
        return theta if equivalence is None else theta | equivalence.init(self.config, float32(block), stats)

    def rounding(self, block: Any, theta: Mapping[str, Any]) -> tuple[Tree, Tree]:
        """The rewritten block in float32, and (matrix, scale, zero) of each kernel to round; both by path."""
        block = float32(block)
        if self.recipe.equivalence is not None:
            block = self.recipe.equivalence.apply(self.config, block, theta)
        flat, logits = flatten_dict(block, sep="/"), flatten_dict(theta["clip"], sep="/")
        offsets = flatten_dict(theta.get("rounding", {}), sep="/")
        rank_one = lambda path: theta.get("compensation") if path == DOWN else None
        out = {}
        for path, scheme in self.schemes:
            matrix, scale, zero = clipped(flat[path], self.grid(scheme), logits[path], rank_one(path))
            matrix = nudged(matrix, scale, offsets[path]) if path in offsets else matrix
            out[path] = (matrix, scale, zero)
        return flat, out

    def fake(self, block: Any, theta: Mapping[str, Any]) -> Any:
        """The rewritten block with kernels on their grids, dense float32, straight-through."""
        flat, rounding = self.rounding(block, theta)
        values = {path: fake_quantize(*rounding[path], self.grid(s)).T for path, s in self.schemes}
        return unflatten_dict(flat | values, sep="/")

    def export(self, block: Any, theta: Mapping[str, Any]) -> Any:
        """The rewritten block in its own dtypes with packed kernels; compensation and offsets are absorbed in the codes."""
        flat, rounding = self.rounding(block, theta)
        original = flatten_dict(block, sep="/")
        out = {path: value.astype(original[path].dtype) for path, value in flat.items()}
        for path, scheme in self.schemes:
            layout, act = Layout.of(out[path].shape, (0,)), self.act(scheme)
            fields = (self.grid(scheme), layout, out[path].dtype.name, act, scheme.scale_dtype)
            out[path] = QuantizedArray.encode(*rounding[path], *fields)
        return unflatten_dict(out, sep="/")

    def grid(self, scheme: Scheme) -> Grid:
        """Grid of a weight."""
        return balanced(scheme.grid) if self.recipe.bit_balance else scheme.grid

    def act(self, scheme: Scheme) -> ActivationQuantizer | None:
        """Quantizer of a weight's inputs."""
        act = scheme.act
        return ActivationQuantizer(balanced(act.grid)) if act is not None and self.recipe.bit_balance else act

    def runner(self, with_map: bool = False) -> BlockRunner:
        """Runs the block that `fake` makes, with its activations rounded."""
        acts = {path.removesuffix("/kernel"): self.act(scheme) for path, scheme in self.schemes}
        inputs = tuple((path, act.grid) for path, act in acts.items() if act is not None)
        return BlockRunner(self.config, inputs, self.recipe.kv_bits, self.recipe.bit_balance, with_map)

    def __call__(self, theta: Mapping[str, Any], frozen: Any, batch: Any) -> Float[Array, ""]:
        """Loss on a batch (x, y_fp, y_aug, attention_fp) with frozen (block, layer)."""
        block, layer = frozen
        x, y_fp, y_aug, attention_fp = batch
        y, attention = self.runner(self.recipe.objective.needs_attention)(self.fake(block, theta), x, layer)
        return self.recipe.objective(y, y_fp, y_aug, attention, attention_fp)


def float32(tree: Any) -> Any:
    """A dense tree in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)
