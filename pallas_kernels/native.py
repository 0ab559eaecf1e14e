"""C++ sources compiled on demand into the user's cache, one library per folder of sources, flags, jax and machine."""

from __future__ import annotations

import ctypes
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


def library(source: pathlib.Path, flags: tuple[str, ...] = FLAGS) -> pathlib.Path:
    """Where the library of a source belongs, whether it has been built or not."""
    return cache_folder() / f"{source.parent.name}-{_digest(source, flags)}.so"


def cache_folder() -> pathlib.Path:
    """Where this user's libraries and records of measurements are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "pallas_kernels"


def build(source: pathlib.Path, flags: tuple[str, ...] = FLAGS) -> pathlib.Path:
    """Compiles the library, if it is not there, and returns its path.

    Raises:
      RuntimeError: no compiler, or it failed; its output is part of the message.
    """
    target = library(source, flags)
    if target.is_file():
        return target
    if (found := compiler()) is None:
        raise RuntimeError(
            f"{source.name}: no C++ compiler; install g++ or clang++, set CXX, or use implementation='xla'"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = pathlib.Path(folder) / "lib.so"
        command = [found, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {result.returncode}:\n{result.stderr[:2000]}")
        os.replace(built, target)
    return target


def register(name: str, symbol: str, path: pathlib.Path) -> None:
    """Makes a handler of a library known to XLA on CPU."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(ctypes.CDLL(str(path)), symbol)), platform="cpu")


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
