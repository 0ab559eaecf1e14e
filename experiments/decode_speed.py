"""Greedy decoding of whole models from packed weights: tokens per second and peak memory beside float32.

    python -m experiments.decode_speed --scheme=w4a8g128      one random model of 1.1 billion parameters: its peak memory

`experiments.arbitrary_bit_matmul` times all schemes in one paired run.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.cards import Row
from experiments.runs import launch
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.transform import compress
from jaxcomp.data import load_embedded
from jaxcomp.evaluate.throughput import Decoder, decoder, paired
from jaxcomp.formats import ActivationQuantizer, Grid, Layout, QuantizedArray, packing
from jaxcomp.models import Llama, LlamaConfig
from jaxcomp.quantize import rtn
from jaxcomp.quantize.learned import BLOCKS
from pallas_kernels.arbitrary_bit_matmul import cpu_ffi
from pallas_kernels.arbitrary_bit_matmul.bench import Scheme, parse_scheme

# The shape of TinyLlama 1.1B.
BILLION = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64
)
HEAD = Scheme(8, 0, 8, 0)  # of the output layer, in every packed model
SCHEMES = ("w8a8", "w4a16g128", "w4a8g128", "w3a8", "w2a8")
PROMPT, STEPS = 16, 16


def random_leaf(key: jax.Array, shape: tuple[int, int], scheme: Scheme) -> QuantizedArray:
    """A leaf [inputs, outputs] with random codes; its dense form is never made."""
    grid = Grid(scheme.bits, scheme.levels, scheme.bits > 1, group_size=scheme.group_size)
    layout = Layout.of(shape, (0,))
    n, k = layout.matrix_shape
    act = scheme.act_bits and ActivationQuantizer(Grid(scheme.act_bits))
    packed = jax.random.bits(key, (n, packing.packed_words(k, scheme.bits)), jnp.uint32)
    scale = jnp.full((n, grid.groups(k)), k**-0.5 / grid.count, jnp.float32)
    return QuantizedArray(packed, scale, None, act or None, layout, grid)


def random_params(config: LlamaConfig, scheme: Scheme | None) -> dict[str, Any]:
    """Params of a Llama with random weights; blocks and output layer packed unless the scheme is None."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def leaf(path, like):
        name, inside = path[-1].key, path[0].key
        if name == "scale":
            return jnp.ones(like.shape, jnp.float32)
        if scheme is None or name != "kernel":
            return jax.random.normal(next(keys), like.shape, jnp.float32) * like.shape[0] ** -0.5
        return random_leaf(next(keys), like.shape, HEAD if inside == "head" else scheme)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def billion(scheme: str | None) -> tuple[Decoder, int]:
    """(decoder of the random model, bytes of its params)."""
    params = random_params(BILLION, None if scheme is None else parse_scheme(scheme))
    return decoder(Llama(BILLION), params, np.ones((1, PROMPT), np.int32), STEPS), nbytes(params)


def embedded(scheme: str | None) -> tuple[Decoder, int]:
    """(decoder of the embedded model rounded to nearest, bytes of its params)."""
    config, params, _ = load_embedded()
    if scheme is not None:
        s = parse_scheme(scheme)
        group = min(s.group_size or 0, 32)  # its layers have 128 inputs
        options = dict(act_bits=s.act_bits) | (dict(group_size=group) if group else {})
        params, _, _ = compress(rtn(s.bits, rules=BLOCKS, symmetric=s.bits > 1, **options), params)
    return decoder(Llama(config), params, np.ones((1, PROMPT), np.int32), 3 * STEPS), nbytes(params)


def model_rows(rounds: int) -> list[Row]:
    """Rows of both models and all schemes, paired; for the large one also the peak memory of a process that holds only it."""
    rows = []
    for name, build in (("embedded model", embedded), ("random 1.1 B parameters", billion)):
        built = {scheme or "float32": build(scheme) for scheme in (None, *SCHEMES)}
        rows += timed_rows(name, built, max(5, rounds // 3))
        del built
        jax.clear_caches()
    for scheme in ("float32", *SCHEMES):
        peak = peak_memory(scheme)
        rows.append(Row(scheme, "random 1.1 B parameters, a process of its own", "peak_memory", "B", peak, peak, peak))
    return rows


def timed_rows(model: str, built: Mapping[str, tuple[Decoder, int]], rounds: int) -> list[Row]:
    """tokens_per_second, speedup and bytes of every scheme."""
    times = paired({scheme: d.run for scheme, (d, _) in built.items()}, rounds)
    setting = f"{model}, greedy, batch 1, {times.cores} cores, load {max(times.load):.1f}"
    rows = []
    for scheme, (d, size) in built.items():
        speed = float(d.tokens / np.median(times.seconds[scheme]))
        exact = lambda metric, unit, value: Row(scheme, setting, metric, unit, value, value, value)  # noqa: B023
        speedup = Row(scheme, setting, "speedup", "", *times.speedup(scheme, "float32"))
        rows += [exact("tokens_per_second", "1/s", speed), speedup, exact("bytes", "B", size)]
        rows += [exact("scratch_of_a_step", "B", d.memory.temporaries)]
    return rows


def peak_memory(scheme: str) -> int:
    """Largest resident set, in bytes, of a fresh process that makes the random model and decodes with it."""
    command = [sys.executable, "-m", "experiments.decode_speed", f"--scheme={scheme}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])["peak_memory"]


def own_peak() -> int:
    """Largest resident set of this program, in bytes; `getrusage` would include that of the process which started it."""
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def main(argv) -> None:
    """Decodes with one random model and prints {"peak_memory", "bytes"}."""
    del argv
    if jax.default_backend() == "cpu":
        cpu_ffi.build()
    name = flags.FLAGS.scheme
    d, size = billion(None if name == "float32" else name)
    jax.block_until_ready(d.run())
    print(json.dumps({"peak_memory": own_peak(), "bytes": size}))


if __name__ == "__main__":
    flags.DEFINE_string("scheme", "w4a8g128", "float32, or w<bits>[l<levels>]a<bits>[g<group>].")
    launch(main)
