"""Finds the fastest tiles of every implementation on this device and records them for the products to come.

    python -m pallas_kernels.arbitrary_bit_matmul.tile_search --shapes=llama7b/down,4096x4096 --schemes=w4a8,w2a8 --rows=1,512

Candidates of a problem run in turns, as in `bench`, whose flags these are; a tile replaces the default one if it is faster by
more than --least, in the median of the ratios within a round. What ABQ-LLM's engine calls its automatic kernel search.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pallas_kernels.arbitrary_bit_matmul import api, bench, tiles
from pallas_kernels.arbitrary_bit_matmul.shapes import Shape
from pallas_kernels.arbitrary_bit_matmul.spec import Tile


class Found(NamedTuple):
    """Result of one problem.

    Attributes:
      key: see `tiles.key`.
      tile: the fastest, or the default.
      microseconds: median time by tile, the default first.
      gain: median of time of the default over that of `tile`.
    """

    key: str
    tile: Tile
    microseconds: dict[Tile, float]
    gain: float


def search(shape: Shape, rows: int, scheme: str, name: str, options: bench.Options, least: float) -> Found | None:
    """The tiles of one problem; None where the implementation does not cover it or has nothing to choose."""
    parsed = bench.parse_scheme(scheme)
    x = jax.random.normal(jax.random.key(1), (rows, shape.k), jnp.float32)
    spec = bench.spec_of(shape, parsed)
    inner = jax.ShapeDtypeStruct(x.shape, jnp.float32 if parsed.act_bits is None else jnp.int8)
    candidates = api.BACKENDS[name].tiles(spec, inner)
    if len(candidates) < 2 or api.BACKENDS[name].refuse(spec, inner):
        return None
    timed = {}
    for tile in candidates:
        with tiles.trying(tile):
            timed[tile] = bench.quantized(shape, x, parsed, name, options.working_set)
    seconds = bench.measure(timed, options)
    gains = {tile: float(np.median(seconds[candidates[0]] / taken)) for tile, taken in seconds.items()}
    best = max(gains, key=gains.get)
    best = best if gains[best] > 1 + least else candidates[0]
    times = {tile: 1e6 * float(np.median(taken)) for tile, taken in seconds.items()}
    return Found(tiles.key(name, spec, inner), best, times, gains[best])


def search_all(
    shapes: Sequence[Shape], rows: Sequence[int], schemes: Sequence[str], options: bench.Options, least: float
) -> Iterator[Found]:
    """`search` over all problems and implementations."""
    for shape in shapes:
        for m in rows:
            for scheme in schemes:
                for name in options.implementations or api.platform_preference():
                    if (found := search(shape, m, scheme, name, options, least)) is not None:
                        yield found


def main(argv: Sequence[str]) -> None:
    """Searches, prints a line per problem, and records each result at once: a killed search keeps what it has."""
    del argv
    f, options = flags.FLAGS, bench.given_options()
    shapes, rows, kept = [bench.parse_shape(s) for s in f.shapes], [int(m) for m in f.rows], {}
    for found in search_all(shapes, rows, f.schemes, options, f.least):
        path = tiles.record({found.key: found.tile})
        kept[found.key] = found.tile
        times = ", ".join(f"{'x'.join(map(str, tile))} {time:.0f} us" for tile, time in found.microseconds.items())
        print(
            f"{found.key}: {times}; takes {'x'.join(map(str, found.tile))}, {found.gain:.2f}x the default", flush=True
        )
    if not kept:
        raise SystemExit("tile_search: no implementation of this platform has tiles to choose for these problems")
    print(f"{len(kept)} problems recorded in {path}")
    if f.out:
        pathlib.Path(f.out).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    bench.define_flags()
    flags.DEFINE_float("least", 0.03, "Gain over the default tile from which another is taken.", lower_bound=0.0)
    app.run(main)
