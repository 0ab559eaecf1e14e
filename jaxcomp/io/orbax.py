"""Checkpoints of param trees with compressed leaves: arrays by Orbax, everything else in the manifest.

    folder/manifest.json   replaced atomically, last: it names the arrays folder that is valid
    folder/arrays-N/       one Orbax checkpoint of {path/component: array}, uncompressed: packed codes do not
                           shrink, and so no file can claim more memory than it has bytes

A save writes arrays-(N+1), flushes it, replaces the manifest, then removes older arrays. Killed at any time,
the folder holds the old checkpoint or the new one, never a mixture; without a manifest it holds none.
"""

import hashlib
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import jaxcomp.formats  # noqa: F401  (registers every leaf kind)
from jaxcomp.io import manifest
from jaxcomp.io.files import CheckpointError, sync

ShardingFn = Callable[[str, str, tuple[int, ...]], jax.sharding.Sharding | None]


def save(folder, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
    """Saves a nested dict of arrays and compressed leaves, with JSON-able `meta` (config, commit, method).

    With several processes all of them call it on a shared file system; process 0 alone writes the manifest.

    Raises:
      CheckpointError: the folder is in use and `overwrite` is False, or `params` cannot be stored.
    """
    folder = pathlib.Path(folder).absolute()
    leaves, arrays = manifest.describe(params)
    meta = manifest.plain(dict(meta or {}), "meta")
    old = _generations(folder)
    if not overwrite and folder.exists() and set(folder.iterdir()) - old.keys():
        raise CheckpointError(folder, "a new folder", "files in it", "pass overwrite=True or another folder")
    target = folder / f"arrays-{max(old.values(), default=0) + 1}"
    multihost_utils.sync_global_devices("jaxcomp.save.begin")
    folder.mkdir(parents=True, exist_ok=True)
    _save_arrays(target, {f"{path}/{name}": array for (path, name), array in arrays.items()})
    if jax.process_index() == 0:
        files = {name: _flush(path) for name, path in _files(target).items()}
        for path in [*filter(pathlib.Path.is_dir, target.rglob("*")), target, folder]:
            sync(path)
        manifest.write(folder, manifest.Manifest(target.name, leaves, files, meta))
        for path in old:
            shutil.rmtree(path)
    multihost_utils.sync_global_devices("jaxcomp.save.end")


def restore(
    folder, sharding: jax.sharding.Sharding | ShardingFn | None = None, verify: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, meta) of a checkpoint.

    Args:
      folder: what `save` wrote.
      sharding: of every array, or a function of (path, component, shape); None is the first local device.
      verify: compare the digest of every file first (reads them once more).

    Raises:
      CheckpointError: the checkpoint is unfinished, damaged, or contradicts itself.
    """
    folder = pathlib.Path(folder).absolute()
    found = manifest.read(folder)
    target, file = folder / found.arrays, folder / manifest.NAME
    wanted = {(path, name): spec for path, leaf in found.leaves.items() for name, spec in leaf.arrays.items()}
    structs = {key: _struct(*key, spec, sharding) for key, spec in wanted.items()}
    manifest.assemble(found.leaves, structs, file)  # leaf classes check their parts before any array is read
    _check_files(target, found.files, verify)
    stored = sum(spec.nbytes for spec in found.files.values())
    if (needed := sum(spec.nbytes for spec in wanted.values())) > stored:
        expected, remedy = f"at most {stored} bytes of arrays", "the manifest is damaged"
        raise CheckpointError(file, expected, f"{needed}", remedy)
    restored = _restore_arrays(target, {"/".join(key): struct for key, struct in structs.items()})
    arrays = {key: restored["/".join(key)] for key in wanted}
    return manifest.assemble(found.leaves, arrays, file), dict(found.meta)


def _generations(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    """Arrays folders with their numbers, finished or not, Orbax's own temporary ones too."""
    matches = {path: re.match(r"arrays-(\d{1,9})(\.|$)", path.name) for path in folder.glob("arrays-*")}
    return {path: int(match[1]) for path, match in matches.items() if match}


def _save_arrays(target: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes the arrays; those of no elements live in the manifest alone, as Orbax has no form for them."""
    arrays = {key: x if isinstance(x, jax.Array) else np.asarray(x) for key, x in arrays.items() if x.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(target, args=ocp.args.PyTreeSave(arrays))


def _restore_arrays(target: pathlib.Path, structs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the arrays after comparing what Orbax stores with what the manifest promises."""
    empty = {key: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding) for key, s in structs.items() if not s.size}
    structs = {key: struct for key, struct in structs.items() if struct.size}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            tree = checkpointer.metadata(target).item_metadata.tree
            held = {key: (tuple(meta.shape), np.dtype(meta.dtype)) for key, meta in tree.items()}
            if held != {key: (struct.shape, struct.dtype) for key, struct in structs.items()}:
                raise ValueError("other arrays than the manifest lists")
            args = ocp.checkpoint_utils.construct_restore_args(structs)
            return checkpointer.restore(target, args=ocp.args.PyTreeRestore(structs, restore_args=args)) | empty
    except Exception as error:  # the array store is outside our control and may fail in any way on damaged files
        raise CheckpointError(target, "readable arrays", f"{error!r}", "restore another checkpoint") from error


def _struct(path: str, name: str, spec: manifest.ArraySpec, sharding) -> jax.ShapeDtypeStruct:
    if jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype:
        remedy = "set jax_enable_x64"
        raise CheckpointError("restore", "a dtype that JAX has enabled", str(spec.dtype), remedy, f"{path}/{name}")
    chosen = sharding(path, name, spec.shape) if callable(sharding) else sharding
    chosen = chosen or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=chosen)


def _files(target: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files below a folder by relative name; links are none."""
    paths = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {path.relative_to(target).as_posix(): path for path in sorted(paths)}


def _flush(path: pathlib.Path) -> manifest.FileSpec:
    """Size and digest of a file, flushed to the disk."""
    sync(path)
    with path.open("rb") as file:
        return manifest.FileSpec(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _check_files(target: pathlib.Path, expected: Mapping[str, manifest.FileSpec], verify: bool) -> None:
    """The folder must hold exactly the listed files, with their sizes and, if asked, digests."""
    found, remedy = _files(target), "restore another copy of the checkpoint"
    if found.keys() != expected.keys():
        difference = sorted(found.keys() ^ expected.keys())
        raise CheckpointError(target, f"{len(expected)} listed files", f"a difference in {difference}", remedy)
    for name, path in found.items():
        if path.is_symlink() or (size := path.stat().st_size) != expected[name].nbytes:
            found_size = "a link" if path.is_symlink() else f"{size} bytes"
            raise CheckpointError(path, f"{expected[name].nbytes} bytes", found_size, remedy)
        if verify and _flush(path).sha256 != expected[name].sha256:
            raise CheckpointError(path, f"sha256 {expected[name].sha256}", "another", remedy)
