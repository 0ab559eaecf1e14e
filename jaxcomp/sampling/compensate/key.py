"""Calibrations of correctors on disk, under a key: what was calibrated is good for one model, precision and solver only."""

import hashlib
import json
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaf import path_str
from jaxcomp.io.files import CheckpointError, parse_json
from jaxcomp.io.safetensors import open_safetensors, save_safetensors
from jaxcomp.sampling.solvers import LinearSolver

Coefficients = TypeVar("Coefficients", bound=tuple)


class Key(NamedTuple):
    """What a calibration depends on.

    Attributes:
      model: digest of the full-precision params.
      quantized: digest of the quantized params: bits, scales, codes, ranks.
      solver: digest of the solver's coefficients.
      steps: of the solver.
      guidance: scale of classifier-free guidance, 1 for none.
      plan: computed steps of a cache as a string of 0 and 1; empty for none.
    """

    model: str
    quantized: str
    solver: str
    steps: int
    guidance: float = 1.0
    plan: str = ""


def digest(params: Any) -> str:
    """Short hash of a tree: paths, static fields of compressed leaves, dtypes, shapes and values."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    hashed = hashlib.sha256(str(structure).encode())
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        hashed.update(f"{path_str(path)} {array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()[:16]


def key_of(params: Any, quantized: Any, solver: LinearSolver, guidance: float = 1.0, plan: Any = None) -> Key:
    """The key of a calibration; `plan` is the mask of computed steps of a cache, if there is one."""
    mask = "" if plan is None else "".join(str(int(computed)) for computed in plan)
    return Key(digest(params), digest(quantized), solver.digest, solver.steps, float(guidance), mask)


def save_calibration(path, coefficients: Coefficients, key: Key) -> None:
    """Writes the arrays of a NamedTuple with their key to a safetensors file, atomically."""
    metadata = {"kind": type(coefficients).__name__, "key": json.dumps(key._asdict())}
    save_safetensors(path, {name: np.asarray(a) for name, a in coefficients._asdict().items()}, metadata)


def load_calibration(path, kind: type[Coefficients], key: Key) -> Coefficients:
    """Coefficients of class `kind` from a file that `save_calibration` wrote under the same key.

    Raises:
      CheckpointError: the file is damaged, holds another kind, or was calibrated for something else; the message says what.
    """
    with open_safetensors(path) as tensors:
        if (found := tensors.metadata.get("kind")) != kind.__name__ or set(tensors.keys()) != set(kind._fields):
            raise CheckpointError(
                path, f"coefficients of {kind.__name__}", f"{found}", "load them with their own class"
            )
        _check(path, parse_json(tensors.metadata.get("key", "").encode(), path), key)
        arrays = {name: jnp.asarray(tensors.read(name, finite=True)) for name in kind._fields}
    if short := [name for name, array in arrays.items() if array.shape[:1] != (key.steps,)]:
        found = f"{arrays[short[0]].shape}"
        raise CheckpointError(path, f"{key.steps} steps on the first axis", found, "calibrate again", short[0])
    return kind(**arrays)


def _check(path, found: Any, key: Key) -> None:
    wanted = key._asdict()
    found = found if isinstance(found, dict) else {}
    if differ := [name for name in wanted if found.get(name) != wanted[name]]:
        expected = ", ".join(f"{name} {wanted[name]!r}" for name in differ)
        other = ", ".join(f"{name} {found.get(name)!r}" for name in differ)
        remedy = "calibrate for this model, precision and solver; coefficients do not transfer"
        raise CheckpointError(path, expected, other, remedy)
