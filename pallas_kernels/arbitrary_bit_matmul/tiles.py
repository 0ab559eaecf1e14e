"""Tile sizes that `tile_search` found fastest: one JSON file per device in the user's cache, read once."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping

import jax

from pallas_kernels import native
from pallas_kernels.arbitrary_bit_matmul.spec import Tile, WeightSpec

_trial: contextvars.ContextVar[Tile | None] = contextvars.ContextVar("tile", default=None)


def key(name: str, spec: WeightSpec, x: jax.Array) -> str:
    """A problem of an implementation: rows, shape, precision."""
    levels = f"l{spec.levels}" if spec.levels else ""
    return f"{name} {x.shape[0]}x{spec.n}x{spec.k} w{spec.bits}{levels}g{spec.group_size} {x.dtype}"


def chosen(name: str, spec: WeightSpec, x: jax.Array, candidates: tuple[Tile, ...]) -> Tile | None:
    """The tile on trial, else the recorded one of this device; None where neither is a candidate."""
    tile = _trial.get() or recorded().get(key(name, spec, x))
    return tile if tile in candidates else None


@contextlib.contextmanager
def trying(tile: Tile) -> Iterator[None]:
    """All products that are traced within use this tile."""
    token = _trial.set(tile)
    try:
        yield
    finally:
        _trial.reset(token)


def file() -> pathlib.Path:
    """Where the tiles of the default device are recorded."""
    device = jax.devices()[0]
    kind = native.machine() if device.platform == "cpu" else device.device_kind
    digest = hashlib.sha256(f"{kind} jax {jax.__version__}".encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower())
    return native.cache_folder() / f"tiles-{slug}-{digest}.json"


@functools.cache
def recorded() -> Mapping[str, Tile]:
    """Tile by `key`; a damaged file counts as empty and is named in a warning."""
    path = file()
    try:
        found = json.loads(path.read_text())
        return {str(name): tuple(int(size) for size in tile) for name, tile in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path}: no record of tiles ({error}); default tiles are used, delete or rebuild it", stacklevel=2
        )
        return {}


def record(found: Mapping[str, Tile]) -> pathlib.Path:
    """Adds tiles to the device's file, atomically, and returns its path; products traced from now on use them."""
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps({**recorded(), **found}, indent=1, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as temporary:
        temporary.write(body + "\n")
    os.replace(temporary.name, path)
    recorded.cache_clear()
    return path
