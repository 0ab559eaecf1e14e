"""Work that is done once: named stages with JSON results, recorded in one file of an output folder.

A stage that a killed run finished is not run again. The file also holds the identity of the run (all that its results depend
on): results of other settings are never mixed in.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxcomp.io.files import CheckpointError, read_json, replacing, write_json

NAME = "stages.json"


class Stages:
    """The stage file of a folder.

    Attributes:
      folder: where it lies.
      log: called with one line per stage.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        identity: Mapping[str, Any],
        outputs: Iterable[str] = (),
        overwrite: bool = False,
        log: Callable[[str], None] = print,
    ):
        """Opens or starts a run.

        Args:
          folder: output folder, created if absent.
          identity: JSON-able settings; a stage file with others is an error.
          outputs: names of files and folders below `folder` that the stages write; leftovers of a killed run are removed.
          overwrite: discard a run with other settings, and its outputs.
          log: called with one line per stage.

        Raises:
          CheckpointError: the folder holds a run with other settings, or files of something else.
        """
        self.folder, self.log = pathlib.Path(folder), log
        self._identity = json.loads(json.dumps(dict(identity), allow_nan=False))
        self._outputs = tuple(outputs)
        self._results = self._open(overwrite)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep(() if self._results else self._outputs)
        multihost_utils.sync_global_devices("jaxcomp.stages.open")  # all have read before process 0 writes

    def run(self, name: str, work: Callable[[], Any], sound: Callable[[Any], bool] = lambda result: True) -> Any:
        """The JSON-able result of a stage, recorded or worked out now; with several processes all of them call it.

        Args:
          name: of the stage.
          work: does it.
          sound: whether what a recorded result promises is still there; if not, the stage and all after it run again.
        """
        if name in self._results and not sound(self._results[name]):
            self.forget(name)
        if name in self._results:
            self.log(f"{name}: done before")
            return self._results[name]
        start = time.perf_counter()
        self._results[name] = json.loads(json.dumps(work(), allow_nan=False))
        self.log(f"{name}: {time.perf_counter() - start:.1f} s")
        self._write()
        return self._results[name]

    def forget(self, name: str) -> None:
        """Drops a stage and all after it, whose outputs proved damaged."""
        names = list(self._results)
        for later in names[names.index(name) :] if name in names else ():
            del self._results[later]
        self._write()

    def _open(self, overwrite: bool) -> dict[str, Any]:
        path = self.folder / NAME
        if not path.exists():
            known = {NAME, *self._outputs}
            foreign = [p.name for p in self.folder.glob("*") if p.name not in known and not p.name.endswith(".tmp")]
            if foreign:
                remedy = "choose another folder"
                raise CheckpointError(self.folder, "a new folder or one of this job", f"{sorted(foreign)[:3]}", remedy)
            return {}
        found = read_json(path)
        if overwrite or not isinstance(found, dict) or found.keys() != {"identity", "stages"}:
            return {}
        if difference := _difference(found["identity"], self._identity):
            remedy = "choose another folder, or discard that run with --overwrite"
            raise CheckpointError(self.folder, "a run with the same settings", difference, remedy)
        return found["stages"]

    def _sweep(self, outputs: Iterable[str]) -> None:
        """Removes temporaries of a killed run, and whole outputs where nothing is recorded."""
        if outputs:
            (self.folder / NAME).unlink(missing_ok=True)
        for name in outputs:
            discard(self.folder / name)
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self) -> None:
        if jax.process_index() == 0:
            with replacing(self.folder / NAME) as temporary:
                write_json(temporary, {"identity": self._identity, "stages": self._results})


def discard(path: str | pathlib.Path) -> None:
    """Removes a file or folder; a folder is renamed first, so that no half of it is ever seen under its name."""
    path = pathlib.Path(path)
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.discarded.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """The settings that differ, as text; empty if none does."""
    flat_found, flat_wanted = _flatten(found), _flatten(wanted)
    keys = [k for k in {**flat_found, **flat_wanted} if flat_found.get(k) != flat_wanted.get(k)]
    return ", ".join(f"{k} {flat_found.get(k)!r} there and {flat_wanted.get(k)!r} here" for k in keys[:4])


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
