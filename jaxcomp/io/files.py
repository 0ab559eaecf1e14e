"""Files of a checkpoint: the one error, strict JSON, plain names inside one folder, atomic replacement."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

MAX_JSON_BYTES = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: file, tensor, what was expected, what was found, the remedy."""

    def __init__(self, file, expected: str, found: str, remedy: str, tensor: str | None = None):
        self.file, self.tensor, self.expected, self.found, self.remedy = file, tensor, expected, found, remedy
        where = _short(str(file)) + ("" if tensor is None else f": tensor {_short(repr(tensor))}")
        super().__init__(f"{where}: expected {expected}, found {_short(found)}; {remedy}")


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def read_json(path) -> object:
    """The strict JSON value of a file of at most `MAX_JSON_BYTES` bytes; raises `CheckpointError`."""
    path, remedy = pathlib.Path(path), "fetch the file again"
    expected = f"a JSON file of at most {MAX_JSON_BYTES} bytes"
    if not os.path.isfile(path):
        raise CheckpointError(path, expected, "no file", remedy)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(path, expected, f"{size} bytes", remedy)
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(path, expected, str(error), "check its permissions") from None


def parse_json(raw: bytes, file) -> object:
    """Parses strict JSON: UTF-8, no repeated key, no NaN; raises `CheckpointError` naming `file`."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(file, "strict UTF-8 JSON", found, "fetch the file again") from None


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated within one object")
    "".join(result).encode("utf-8")  # rejects lone surrogates
    return result


def _no_constant(name: str):
    raise ValueError(f"the constant {name} is not JSON")


@contextlib.contextmanager
def replacing(path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write; on success it is synced and renamed onto `path`, else deleted."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # the safetensors library writes files that nobody else may read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: object) -> bool:
    """True for a string that names an entry of a folder: no separator, no drive, not "." or ".."."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(char in name for char in "/\\:\0")


def inside(folder, name: str) -> pathlib.Path:
    """The file `name` directly in `folder`; a separator, ".." or a link out of it is a `CheckpointError`.

    Links from a Hugging Face hub snapshot into the `blobs` folder of the same repository are followed.
    """
    folder, remedy = pathlib.Path(folder), "use a checkpoint whose files all lie in its folder"
    if not is_plain_name(name):
        raise CheckpointError(folder, "a plain file name", repr(name), remedy)
    path, home = folder / name, folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or not encodable
        raise CheckpointError(folder, "a usable file name", f"{name!r}: {error}", remedy) from None
    if real.parent not in homes:
        raise CheckpointError(path, f"a file inside {home}", f"a link to {real}", remedy)
    return path


@contextlib.contextmanager
def new_folder(path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling folder to fill; on success it is renamed to `path`, else deleted.

    Raises:
      CheckpointError: `path` is a file or a folder that holds something.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(path, "a new or empty folder", "files", "choose another folder or clear it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)  # an empty folder gives way
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, value: object) -> None:
    """Writes indented JSON and flushes it to the disk."""
    path = pathlib.Path(path)
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)
