"""DITN's deployment rewrites, each exact but the first: tanh for LayerNorm, its map merged, convolutions as a CPU likes them.

    python -m experiments.ditn [--sizes=64,128] [--rounds=9] [--out=experiments/results]

Random weights: times and exactness do not depend on them, and the authors publish none. PSNR is taken from the card of
`experiments.sr_budget`, where it is in the same folder. Needs a C++ compiler and no data. About 4 minutes on two CPU cores.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import sr
from experiments.cards import Card, Row, command_line, current_commit, current_device
from experiments.runs import launch
from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import compress
from jaxcomp.deploy import cpu_convolutions
from jaxcomp.evaluate.complexity import complexity
from jaxcomp.evaluate.throughput import Paired, paired
from jaxcomp.models.ditn import DITN, ditn_tiny, merge_norm, substitute_norm

LABELS = {
    "layer": "LayerNorm (DITN-Tiny)",
    "tanh": "tanh (DITN-Real)",
    "merged": "tanh, merged",
    "shifted": "tanh, merged, convolutions for CPU",
    "native": "tanh, merged, convolutions for CPU in C++",
}
REWRITTEN = ("merged", "shifted", "native")  # exact forms of "tanh"
POSTER = {"tanh": 16 / 11}  # latency of DITN-Tiny over that of DITN-Real, x4
NOTE = "Paper: x4 latencies of 16 and 11 ms in TensorRT on a static input, read from the authors' poster"
DEPTHWISE = {  # window, dilation, channels, patch (0: the whole map)
    "3 x 3, 240 channels, patches": (3, 1, 240, 8),
    "5 x 5, 60 channels": (5, 1, 60, 0),
    "7 x 7 dilated by 3, 60 channels": (7, 3, 60, 0),
}
DEPARTURES = (
    "The authors publish no weights and no definition of DITN-Tiny; its layer counts are those of DITN-Real. Times are of random "
    "weights; PSNR is of a tiny DITN that was trained here beside RLFN and IMDN under one budget.",
    "The paper times TensorRT on a GPU, this card XLA on a CPU. There LayerNorm fuses and reshapes are nearly free, so that the "
    "substitution gains little; unmerged, tanh replaces LayerNorm by two more matrix products per layer. What a CPU gains from "
    "is another form of the depthwise convolutions, which XLA runs channel by channel.",
    "Where the interval of a ratio holds 1, the run does not tell the forms apart; the load is that of the whole machine.",
)


class Form(NamedTuple):
    """DITN in one of its deployed forms: network, params, and the dense params that have the same cost."""

    model: DITN
    params: Any
    dense: Any

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """The network; params may hold compressed leaves."""
        return compressed(self.model.apply)({"params": params}, x)


def forms(tiny: DITN, native: bool = True) -> dict[str, Form]:
    """Each form rewritten from the one before; the last two differ by who runs the dense convolutions."""
    layer = jax.jit(tiny.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    tanh = spread(substitute_norm(layer), 0)
    merged, deployed = merge_norm(tanh), tiny.clone(norm="merged")
    by_norm = {"layer": layer, "tanh": tanh, "merged": merged}
    found = {norm: (tiny.clone(norm=norm), params, params) for norm, params in by_norm.items()}
    for name in ("shifted", *(["native"] if native else [])):
        found[name] = (deployed, compress(cpu_convolutions(name == "native"), merged)[0], merged)
    return {name: Form(*form) for name, form in found.items()}


def spread(params: Any, seed: int) -> Any:
    """The params with noise, so that no bias or gain is at its initial zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), params)


def measure(size: int, rounds: int, found: Mapping[str, Form]) -> tuple[Paired, dict[str, float]]:
    """Interleaved times of all forms at `size` x `size`; the errors of the exact rewrites as shares of the output's span."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, size, size, 3)), jnp.float32)
    functions = {}
    for name, form in found.items():
        program = jax.jit(form.apply).lower(form.params, x).compile()
        functions[name] = lambda program=program, params=form.params: program(params, x)
    plain = np.asarray(functions["tanh"]())
    error = lambda name: float(np.abs(plain - np.asarray(functions[name]())).max() / np.ptp(plain))
    return paired(functions, rounds), {name: error(name) for name in REWRITTEN if name in found}


def rows(size: int, times: Paired, errors: Mapping[str, float], found: Mapping[str, Form]) -> list[Row]:
    """Costs, times and ratios of all forms."""
    setting, result = f"{size} x {size}, x4, float32, batch 1", []
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    for name, form in found.items():
        count = complexity(form.apply, form.dense, image)
        paper = POSTER.get(name)
        measures = [
            sr.exact("params", "", count.params),
            sr.exact("macs_G", "G", count.macs / 1e9),
            ("runtime_ms", "ms", *sr.median_interval(times.seconds[name] * 1e3)),
            *([sr.exact("max_difference_from_tanh", "of the span", errors[name])] if name in errors else []),
        ]
        result += [Row(LABELS[name], setting, *fields) for fields in measures]
        speedup = times.speedup(name, "layer")
        result.append(Row(LABELS[name], setting, "speedup_vs_layernorm", "", *speedup, paper, NOTE if paper else ""))
    return result


def depthwise_rows(size: int, rounds: int) -> list[Row]:
    """Each depthwise convolution of the network alone: XLA's grouped form against shifted multiply-adds."""
    result, rng = [], np.random.default_rng(0)
    for label, (kernel, dilation, channels, patch) in DEPTHWISE.items():
        shape = ((size // patch) ** 2, patch, patch, channels) if patch else (1, size, size, channels)
        layer = nn.Conv(channels, (kernel, kernel), kernel_dilation=dilation, feature_group_count=channels)
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        grouped = jax.jit(layer.init)(jax.random.key(0), x)
        functions = {}
        for name, params in (("grouped", grouped), ("shifted", compress(cpu_convolutions(False), grouped)[0])):
            program = jax.jit(compressed(layer.apply)).lower(params, x).compile()
            functions[name] = lambda program=program, params=params, x=x: program(params, x)
        np.testing.assert_allclose(functions["shifted"](), functions["grouped"](), atol=1e-4)
        times, setting = paired(functions, rounds), f"depthwise convolutions of {size} x {size}, float32"
        for name, seconds in times.seconds.items():
            result.append(Row(label, setting, f"{name}_ms", "ms", *sr.median_interval(seconds * 1e3)))
        result.append(Row(label, setting, "speedup_of_shifted", "", *times.speedup("shifted", "grouped")))
    return result


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("sizes", ["64", "128"], "Heights and widths of the low-resolution input.")
    flags.DEFINE_integer("rounds", 9, "Timed runs of each form, interleaved.", lower_bound=1)
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Measures and writes the card `ditn`."""
    del argv
    start, args, found, loads = time.monotonic(), flags.FLAGS, [], []
    deployed = forms(ditn_tiny())
    for size in map(int, args.sizes):
        times, errors = measure(size, args.rounds, deployed)
        found += rows(size, times, errors, deployed) + depthwise_rows(size, args.rounds)
        loads += times.load
    found += sr.cited_rows(args.out, "sr_budget", lambda row: True)
    paper = "Unfolding Once is Enough: A Deployment-Friendly Transformer Unit for Super-Resolution, ACM MM 2023, arXiv 2308.02794"
    command = command_line("experiments.ditn", sys.argv[1:])
    device = f"{current_device()}, load {max(loads):.1f}, jax {jax.__version__}"
    minutes = (time.monotonic() - start) / 60
    card = Card("ditn", paper, command, current_commit(), device, minutes, [0], found, DEPARTURES)
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
