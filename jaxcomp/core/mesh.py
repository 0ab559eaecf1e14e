"""Devices as a mesh with named axes, params and batches placed on it, runs of several processes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcomp.core.leaf import CompressedArray, is_compressed, leaves_with_paths, map_leaves
from jaxcomp.core.rules import Rule

# Where the output features of a dense leaf lie. A compressed leaf stores its rows (outputs) on the last axis but one.
RULES = (Rule("re:(.*/)?embedding(/value)?", axis=0), Rule("**", axis=-1))

Placement = Callable[[str, str, tuple[int, ...]], NamedSharding]  # (path, component, shape) -> sharding


def initialize_distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins a run of several processes; call it before anything else touches JAX. Nothing given: a single process.

    Args:
      coordinator: "host:port" of process 0; "auto" lets JAX ask the cluster (SLURM, Kubernetes, TPU pods).
      num_processes: how many processes run.
      process_id: number of this one.

    Raises:
      ValueError: only a part is given.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return
    if given == ("auto", None, None):
        given = (None, None, None)
    elif None in given:
        raise ValueError(f"expected coordinator, num_processes and process_id together, found {given}; give all three")
    jax.distributed.initialize(*given)


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a text like "data:2,model:4", over the first devices that there are.

    Args:
      text: axes and their sizes; batches are split over `data`, params over `model`.
      devices: all devices of all processes by default.

    Raises:
      ValueError: bad syntax, an axis named twice, more devices than exist, or, with several processes, fewer.
    """
    axes = [re.fullmatch(r"\s*([A-Za-z_]\w*):([1-9]\d*)\s*", part) for part in text.split(",")]
    if not all(axes):
        raise ValueError(f"mesh {text!r}: expected axes like 'data:2,model:4'")
    names, sizes = [axis[1] for axis in axes], [int(axis[2]) for axis in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"mesh {text!r}: an axis appears twice; name each axis once")
    devices = jax.devices() if devices is None else devices
    wanted, exact = math.prod(sizes), len({device.process_index for device in devices}) > 1
    if wanted > len(devices) or (exact and wanted < len(devices)):
        remedy = f"choose sizes whose product is {'' if exact else 'at most '}{len(devices)}"
        if devices[0].platform == "cpu":
            remedy += f", or set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        raise ValueError(f"mesh {text!r}: needs {wanted} devices, found {len(devices)}; {remedy}")
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=devices[:wanted])


def placement(mesh: Mesh, rules: Sequence[Rule] = RULES) -> Placement:
    """Where every array of a param tree lives: its output features are split over `model`, all else is replicated.

    Contractions are never split, so each output is summed in the same order as on one device. An axis that `model` does not
    divide is replicated (`not_split` lists those). The function also serves `jaxcomp.io.orbax.restore`.

    Args:
      mesh: a mesh; without an axis `model` every array is replicated.
      rules: first match wins; `Rule(pattern, axis=...)` names the axis to split of dense leaves, `skip=True` replicates.
    """

    def sharding(path: str, component: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = _axis(rules, path, component, shape)
        parts = [None] * len(shape)
        if axis is not None and _divides(mesh, shape[axis]):
            parts[axis] = "model"
        return NamedSharding(mesh, PartitionSpec(*parts))

    return sharding


def _axis(rules: Sequence[Rule], path: str, component: str, shape: tuple[int, ...]) -> int | None:
    """The axis to split, if there is one."""
    rule = next((rule for rule in rules if rule.matches(path)), None)
    if len(shape) < 2 or rule is None or rule.skip:
        return None
    return rule.options["axis"] if component == "value" else -2


def _divides(mesh: Mesh, size: int) -> bool:
    return "model" in mesh.shape and size % mesh.shape["model"] == 0


def shard_params(params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """The tree on the mesh, placed by `placement`; every process passes the same tree."""
    where = placement(mesh, rules)

    def place(path: str, leaf: Any) -> Any:
        if not is_compressed(leaf):
            return _put(leaf, where(path, "value", tuple(leaf.shape)))
        parts = {name: _put(array, where(path, name, tuple(array.shape))) for name, array in leaf.components().items()}
        return _with_components(leaf, parts)

    return map_leaves(place, params)


def _with_components(leaf: CompressedArray, parts: dict[str, jax.Array]) -> CompressedArray:
    return type(leaf).from_parts(parts, leaf.statics())


def not_split(params: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> dict[str, str]:
    """{path: reason} of the matrices that are replicated because `model` does not divide their outputs."""
    reasons = {}
    for path, leaf in leaves_with_paths(params).items():
        arrays = leaf.components() if is_compressed(leaf) else {"value": leaf}
        for component, array in arrays.items():
            axis = _axis(rules, path, component, array.shape)
            if axis is not None and "model" in mesh.shape and not _divides(mesh, array.shape[axis]):
                reasons[path] = f"{array.shape[axis]} outputs over {mesh.shape['model']} devices"
    return reasons


def shard_batch(batch: Any, mesh: Mesh, local: bool = False) -> Any:
    """Arrays with their first axis split over `data`.

    Args:
      batch: pytree of arrays [batch, ...].
      mesh: a mesh; without an axis `data` the batch is replicated.
      local: False: every process passes the whole batch, and each device takes its part. True: a process passes its own part.

    Raises:
      ValueError: `data` does not divide the batch.
    """
    axis, parts = ("data", mesh.shape["data"]) if "data" in mesh.shape else (None, 1)
    sharding = NamedSharding(mesh, PartitionSpec(axis))

    def place(x):
        x = np.asarray(x)
        size = len(x) * (jax.process_count() if local else 1)
        if size % parts:
            raise ValueError(
                f"a batch of {size} does not divide over {parts} devices of axis 'data'; choose a multiple"
            )
        return jax.make_array_from_process_local_data(sharding, x, None if local else x.shape)

    return jax.tree.map(place, batch)


def replicate_outputs(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`fn` with its results on every device, so that every process can read them."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return lambda *args, **kwargs: jax.lax.with_sharding_constraint(fn(*args, **kwargs), everywhere)


def fetch(tree: Any) -> Any:
    """The tree with numpy arrays in every process, gathered from all of them where necessary."""
    gather = lambda x: np.asarray(x) if _readable(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(gather, tree)


def _readable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda a: a, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
