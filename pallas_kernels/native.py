"""C++ sources compiled on demand into the user's cache, one library per folder of sources, flags, jax and machine."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-march=native", "-w")


@dataclasses.dataclass(frozen=True)
class Library:
    """A source that is compiled on demand into the user's cache, and its handlers.

    Attributes:
      source: the C++ file; it may include others of its folder and of this one.
      handlers: (target, symbol) of every handler: its name in XLA and in the source.
      flags: of the compiler.
    """

    source: pathlib.Path
    handlers: tuple[tuple[str, str], ...]
    flags: tuple[str, ...] = FLAGS

    @property
    def path(self) -> pathlib.Path:
        """Where the library belongs, whether it has been built or not."""
        return cache_folder() / f"{self.source.parent.name}-{_digest(self.source, self.flags)}.so"

    def is_built(self) -> bool:
        """Whether the library is in the user's cache for this source, these flags and this machine."""
        return self.path.is_file()

    def build(self) -> pathlib.Path:
        """Compiles the library, if it is not there, and returns its path.

        Raises:
          RuntimeError: no compiler, or it failed; its output is part of the message.
        """
        target = self.path
        if target.is_file():
            return target
        if (found := compiler()) is None:
            raise RuntimeError(
                f"{self.source.name}: no C++ compiler; install g++ or clang++, set CXX, or use implementation='xla'"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = pathlib.Path(folder) / "lib.so"
            command = [found, *self.flags, f"-I{jax.ffi.include_dir()}", str(self.source), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed with {result.returncode}:\n{result.stderr[:2000]}")
            os.replace(built, target)
        return target

    def refuse(self) -> str | None:
        """Why there is no library and none can be built, or None."""
        return None if self.is_built() or compiler() else "no C++ compiler found (set CXX)"

    def register(self) -> None:
        """Makes the handlers known to XLA on CPU, once; builds the library if need be. Raises as `build`."""
        _register(self)


def cache_folder() -> pathlib.Path:
    """Where this user's libraries and records of measurements are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "pallas_kernels"


@functools.cache
def _register(library: Library) -> None:
    loaded = ctypes.CDLL(str(library.build()))
    for target, symbol in library.handlers:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first that the system has."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


@functools.cache
def _digest(source: pathlib.Path, flags: tuple[str, ...]) -> str:
    """Of all that a library depends on; every product that is traced asks for it, files are read once."""
    folders = (pathlib.Path(__file__).parent, source.parent)  # one source may include another
    sources = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.cc"))]
    facts = (*sources, " ".join(flags).encode(), jax.__version__.encode(), machine().encode())
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]


@functools.cache
def machine() -> str:
    """System, architecture and instruction sets of this machine."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {flags}"
