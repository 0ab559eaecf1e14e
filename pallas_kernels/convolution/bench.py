"""Times the C++ convolution against XLA's in turns: milliseconds, rate and ratio of every shape and dtype.

python -m pallas_kernels.convolution.bench [--shapes=rlfn,imdn] [--rounds=9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.convolution.api import BACKENDS, convolution
from pallas_kernels.convolution.shapes import SHAPES, Shape


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every round by implementation, interleaved, after one run of each."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, shape.height, shape.width, shape.inputs)), dtype)
    kernel = jnp.asarray(rng.normal(size=(shape.window, shape.window, shape.inputs, shape.outputs)), dtype)
    programs = {
        name: jax.jit(lambda x, k, name=name: convolution(x, k, name)).lower(x, kernel).compile() for name in BACKENDS
    }
    seconds = {name: np.empty(rounds + 1) for name in programs}
    for i in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, kernel))
            seconds[name][i] = time.perf_counter() - start
    return {name: values[1:] for name, values in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line per shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    for name in args.shapes.split(","):
        for dtype in ("float32", "bfloat16"):
            found = measure(SHAPES[name], dtype, args.rounds)
            ours, xla = (float(np.median(found[backend])) for backend in BACKENDS)
            ratio = float(np.median(found["xla"] / found["cpu_ffi"]))
            rate = SHAPES[name].macs / ours / 1e9
            print(
                f"{name:12} {dtype:9} C++ {ours * 1e3:6.2f} ms, {rate:4.0f} GMAC/s; XLA {xla * 1e3:6.2f} ms; {ratio:5.2f}x"
            )


if __name__ == "__main__":
    main()
