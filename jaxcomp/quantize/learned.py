"""Block-wise learning of the rounding: the loop that ABQ-LLM, OmniQuant and AffineQuant share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxcomp.core.apply import compressed
from jaxcomp.core.leaf import is_compressed, leaves_with_paths
from jaxcomp.core.reconstruct import reconstruct
from jaxcomp.core.rules import Rule
from jaxcomp.core.transform import Transform
from jaxcomp.io.files import read_json, replacing, write_json
from jaxcomp.models import Llama, LlamaConfig, layer_table, stack_layers, unstack_layers
from jaxcomp.quantize.attention import BlockRunner
from jaxcomp.quantize.let import INPUTS, Equivalence
from jaxcomp.quantize.lwc import compensated_blocks
from jaxcomp.quantize.scheme import Scheme, need_data, targets
from jaxcomp.quantize.student import Rates, Recipe, Student, float32

BLOCKS = (Rule("blocks_*/**/kernel"),)


class Learned(NamedTuple):
    """State of a learned method, by block name.

    Attributes:
      theta: what was learned, by groups of one learning rate: `let`, `clip`, `compensation`, `rounding`.
      losses: mean loss of each epoch.
    """

    theta: dict[str, Any]
    losses: dict[str, np.ndarray]


def learned(
    recipe: Recipe,
    model: Llama,
    rules: Sequence[Rule],
    scheme: Mapping[str, Any],
    checkpoint_dir: str | pathlib.Path | None,
) -> Transform:
    """The transform of a recipe: blocks in order, each from the float stream and from that of the rounded blocks before it.

    Calibration is in float32 whatever the dtype of model and params. It holds, besides one block, four activations [D] of every
    calibration token and, where attention enters the loss, one map [T, T] of every sequence. `stats.batches` are tokens [B, T],
    `stats.apply` is that of the model. Rules name kernels of the unrolled tree (`blocks_3/mlp/up/kernel`), for scanned layers
    too. The state is a `Learned`.

    Args:
      recipe: the method.
      model: the decoder; only its config is read.
      rules: kernels to round, with options per leaf.
      scheme: defaults of `Scheme`.
      checkpoint_dir: where each block's theta is kept after every epoch. The same call with the same model and data continues
        after a kill, to the same bits.

    Raises:
      ValueError: no calibration data, or not tokens of one shape; the tree is not the model's; a rule selects a leaf outside the
        blocks; `checkpoint_dir` holds another run.
    """

    def update(params, state, stats):
        del state
        need_data(stats, recipe.name)
        flat = unstack_layers(params) if "blocks" in params else params
        schemes = _schemes(flat, model.config, rules, scheme)
        tokens = _tokens(stats.batches, recipe.batch_size)
        measured = _measure(params, stats, model.config, recipe.equivalence)
        if checkpoint_dir is not None:
            _claim(pathlib.Path(checkpoint_dir), recipe, schemes, flat, tokens)
        blocks, state = _learn_blocks(recipe, model.config, flat, schemes, tokens, measured, checkpoint_dir)
        return (stack_layers(flat | blocks) if "blocks" in params else flat | blocks), state

    return Transform(lambda params: Learned({}, {}), update)


def _learn_blocks(recipe, config, params, schemes, tokens, measured, checkpoint_dir):
    """(rounded blocks, `Learned`) of a tree of unrolled layers."""
    objective, edges = recipe.objective, compensated_blocks(config.num_layers, *recipe.compensate)
    teacher, optimizer = BlockRunner(config), _optimizer(recipe.rates, len(tokens))
    x_fp = x_q = _embed(config, params["embed"], tokens)
    new, theta, losses = {}, {}, {}
    for i in range(config.num_layers):
        name, block, student = f"blocks_{i}", params[f"blocks_{i}"], Student(config, recipe, schemes[i])
        layer = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), layer_table(config))
        run = dataclasses.replace(teacher, with_map=objective.needs_attention)
        y_fp, attention_fp = _stream(run, float32(block), layer, x_fp)
        y_aug = _stream(teacher, float32(block), layer, x_q)[0] if objective.needs_aug else None
        folder = None if checkpoint_dir is None else pathlib.Path(checkpoint_dir, name)
        start = student.init(block, measured[i], i in edges)
        data, title = (x_q, y_fp, y_aug, attention_fp), f"{recipe.name} {name} of {config.num_layers}"
        result = reconstruct(student, start, (block, layer), data, optimizer, recipe.epochs, folder, title)
        theta[name], losses[name] = result
        new[name], x_q = _finish(student, block, theta[name], layer, x_q)
        x_fp = y_fp
    return new, Learned(theta, losses)


@functools.partial(jax.jit, static_argnums=0)
def _stream(run: BlockRunner, block: Any, layer: Any, xs: Float[Array, "S B T D"]):
    return jax.lax.map(lambda x: run(block, x, layer), xs)


@functools.partial(jax.jit, static_argnums=0)
def _finish(student: Student, block: Any, theta: Any, layer: Any, x_q: Float[Array, "S B T D"]):
    """The packed block, and the stream of the rounded blocks after it."""
    return student.export(block, theta), _stream(student.runner(), student.fake(block, theta), layer, x_q)[0]


@functools.cache
def _optimizer(rates: Rates, steps: int) -> optax.GradientTransformation:
    """AdamW with a rate per group of theta; a `clock` counts epochs."""
    advance = optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, 1 / steps), updates))
    groups = {name: optax.adamw(rate, weight_decay=0.0) for name, rate in dataclasses.asdict(rates).items()}
    return optax.multi_transform(groups | {"clock": advance}, lambda theta: {name: name for name in theta})


def _embed(config: LlamaConfig, embed: Any, tokens: Int[Array, "S B T"]) -> Float[Array, "S B T D"]:
    run = lambda embed, tokens: Llama(config).apply({"params": {"embed": embed}}, tokens, method="embed_tokens")
    return compressed(run)(embed, tokens).astype(jnp.float32)


def _schemes(
    params: Any, config: LlamaConfig, rules: Sequence[Rule], defaults: Mapping[str, Any]
) -> list[tuple[tuple[str, Scheme], ...]]:
    """Schemes by path for each block, in an order that is equal for equal blocks."""
    found = sorted(name for name in params if name.startswith("blocks_"))
    if found != sorted(f"blocks_{i}" for i in range(config.num_layers)):
        raise ValueError(f"the model has blocks_0 to blocks_{config.num_layers - 1}, but the tree holds {found}")
    for path, leaf in leaves_with_paths({name: params[name] for name in found}).items():
        if is_compressed(leaf):
            kind = type(leaf).__name__
            raise ValueError(f"{path}: expected a dense array, found {kind}; learned rounding comes first in a chain")
    schemes = {target.path: target.scheme for target in targets(params, rules, defaults)}
    if outside := [path for path in schemes if not path.startswith("blocks_")]:
        raise ValueError(f"{outside[0]}: only kernels of blocks are learned; round others by another transform")
    return [
        tuple((path.split("/", 1)[1], s) for path, s in sorted(schemes.items()) if path.startswith(f"blocks_{i}/"))
        for i in range(config.num_layers)
    ]


def _tokens(batches: Sequence[Any], batch_size: int) -> Int[Array, "S B T"]:
    """Calibration sequences, `batch_size` to a step."""
    shapes = {getattr(batch, "shape", None) for batch in batches}
    if len(shapes) != 1 or len(next(iter(shapes)) or ()) != 2 or not jnp.issubdtype(batches[0].dtype, jnp.integer):
        raise ValueError(f"expected calibration batches of integer tokens [B, T] of one shape, found {shapes}")
    tokens = np.concatenate([np.asarray(batch) for batch in batches])
    if len(tokens) % batch_size:
        raise ValueError(f"batch_size {batch_size} does not divide the {len(tokens)} calibration sequences; use 1")
    return jnp.asarray(tokens.reshape(-1, batch_size, tokens.shape[1]))


def _measure(params: Any, stats: Any, config: LlamaConfig, equivalence: Equivalence | None) -> list[dict[str, Any]]:
    """Statistics of the inputs of `INPUTS` of the float model, for each block by path below it."""
    if equivalence is None:
        return [{}] * config.num_layers
    name = (lambda i: "blocks") if "blocks" in params else "blocks_{}".format
    wanted = {f"{name(i)}/{path}" for path in INPUTS.values() for i in range(config.num_layers)}
    found = stats(params, equivalence.needs, only=wanted.__contains__)
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{missing[0]}: the calibration's apply does not use it; build Calibration with model.apply")

    def of_block(i):
        inputs = {path: found[f"{name(i)}/{path}"] for path in INPUTS.values()}
        return jax.tree.map(lambda a: a[i], inputs) if "blocks" in params else inputs

    return [of_block(i) for i in range(config.num_layers)]


def _claim(folder: pathlib.Path, recipe: Recipe, schemes: Any, params: Any, tokens: Array) -> None:
    """Marks a folder as that of this run. Raises ValueError if another run owns it."""
    digest = hashlib.sha256(np.asarray(tokens).tobytes())
    for path, leaf in leaves_with_paths(params).items():
        first = [np.asarray(part[:1]) for part in jax.tree.leaves(leaf)]  # a row of every leaf tells models apart
        digest.update(b"".join([path.encode(), *(part.tobytes() for part in first)]))
    run = {"recipe": repr(recipe), "schemes": repr(schemes), "model_and_data": digest.hexdigest()}
    file = folder / "run.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            write_json(temporary, run)
    elif different := [name for name, value in run.items() if read_json(file).get(name) != value]:
        raise ValueError(f"{file}: another run, its {', '.join(different)} differ; use another checkpoint_dir")
