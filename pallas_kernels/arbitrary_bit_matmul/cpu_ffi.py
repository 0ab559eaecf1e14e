"""The core product for few rows on CPU as a C++ call: optional, built once per source and machine by the system's compiler.

    python -c "from pallas_kernels.arbitrary_bit_matmul import cpu_ffi; print(cpu_ffi.build())"

`implementation="cpu_ffi"` builds on first use; `implementation=None` uses it where it has been built. Dense rows of any width are
read as they lie; floating-point rows enter as three int8 digits each, as in `activation.split_digits`.
"""

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
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arbitrary_bit_matmul.layouts import Prepared
from pallas_kernels.arbitrary_bit_matmul.spec import Backend, WeightSpec

SOURCE = pathlib.Path(__file__).with_name("cpu_ffi.cc")
DIGITS = 3
MAX_ROWS = 16  # int8 rows above which XLA's product is faster
_TARGET = "pallas_kernels_arbitrary_bit_matmul"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-march=native", "-w")


def matmul(x: jax.Array, weight: Prepared, scale: Float[Array, "n g"], spec: WeightSpec) -> Float[Array, "m n"]:
    """See `spec.Backend`."""
    _register()
    x = x if x.dtype == jnp.int8 else x.astype(jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((x.shape[0], spec.n), jnp.float32), vmap_method="sequential")
    static = dict(bits=spec.bits, centre=spec.centre, digits=DIGITS, base5=weight.layout == "base5")
    return call(x, weight.data, scale, **static)


def refuse(spec: WeightSpec, x: jax.Array) -> str | None:
    """Why the kernel does not cover a problem, or None."""
    most = MAX_ROWS if x.dtype == jnp.int8 else MAX_ROWS // DIGITS
    if x.shape[0] > most:
        return f"{x.shape[0]} rows of {x.dtype}; it is for at most {most}, XLA is faster above"
    if spec.groups > 1 and spec.group_size % 64 and spec.group_size not in (4, 8, 16, 32):
        return f"groups of {spec.group_size} columns; it takes 4, 8, 16, 32, multiples of 64, or one group"
    return None if is_built() or _compiler() else "no C++ compiler found (set CXX)"


def layouts(spec: WeightSpec) -> tuple[str, ...]:
    """Dense rows; base 5 where it applies."""
    return ("base5", "dense") if spec.levels == 5 and spec.groups == 1 else ("dense",)


BACKEND = Backend("cpu_ffi", layouts, refuse, matmul)


def is_built() -> bool:
    """Whether the library is in the user's cache for this source, compiler flags and machine."""
    return _library().is_file()


def build() -> pathlib.Path:
    """Compiles the library into the user's cache, if it is not there, and returns its path.

    Raises:
      RuntimeError: no compiler, or it failed; its output is part of the message.
    """
    library = _library()
    if library.is_file():
        return library
    if (compiler := _compiler()) is None:
        raise RuntimeError(
            "cpu_ffi: no C++ compiler found; install g++ or clang++, or set CXX, or use implementation='xla'"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = pathlib.Path(folder) / "lib.so"
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"cpu_ffi: {' '.join(command)} failed with {result.returncode}:\n{result.stderr[:2000]}")
        os.replace(built, library)
    return library


@functools.cache
def _register() -> None:
    library = ctypes.CDLL(str(build()))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.ArbitraryBitMatmul), platform="cpu")


def _library() -> pathlib.Path:
    """Where the library is: named by source, flags, jax's headers and the machine's instruction sets."""
    facts = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), jax.__version__.encode(), _machine().encode())
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "pallas_kernels" / f"arbitrary_bit_matmul-{digest}.so"


@functools.cache
def _machine() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {flags}"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
