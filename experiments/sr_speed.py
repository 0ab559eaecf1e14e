"""Times RLFN, RLFN of NTIRE 2022 and IMDN against PyTorch with the same weights, in turns on one machine.

    JAXCOMP_DATA=FOLDER python -m experiments.sr_speed [--sizes=256x256,339x510] [--rounds=5] [--out=experiments/results]

339 x 510 is a DIV2K validation image at x4. Before it is timed every network must answer as its peer does. PyTorch runs in
channels-last layout, without torch.compile (which needs a C++ compiler). Needs the extra `parity`.
"""

import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from absl import app, flags

from experiments import torch_sr
from experiments.cards import Card, Row, current_commit
from experiments.ntire_esr import median_interval
from jaxcomp.evaluate.throughput import Paired, paired
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.models.rlfn import RLFB, RLFN
from jaxcomp.models.sr_blocks import ESA

Size = tuple[int, int]
NETWORKS = {
    "RLFN": ("rlfn_x4", "rlfn_x4", lambda: torch_sr.RLFN(52, 52, 6, 4)),
    "RLFN, NTIRE 2022": ("rlfn_ntire_x4", "rlfn_ntire_x4", lambda: torch_sr.RLFN(46, 48, 4, 4)),
    "IMDN, NTIRE 2022": ("imdn_ntire_x4", "ntire2022_imdn_baseline", torch_sr.IMDN),
}
DTYPES = ("float32", "bfloat16")
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the output's span


class Peers(NamedTuple):
    """One network in JAX and in PyTorch with the same weights, float32."""

    model: nn.Module
    params: Any
    torch: torch.nn.Module


def load(name: str, weights: pathlib.Path) -> Peers:
    """The published network; raises `CheckpointError` as `load_super_resolver`."""
    model, file, peer = NETWORKS[name]
    path, peer = weights / f"{file}.safetensors", peer()
    peer.load_state_dict(safetensors.torch.load_file(path))
    return Peers(*load_super_resolver(model, path), peer.eval())


def runs(peers: Peers, image: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    """{"JAX", "PyTorch": function without arguments} on one image in the network's data range; both compiled or warm."""
    cast = lambda leaf: jnp.asarray(leaf, dtype)
    params, x = jax.tree.map(cast, peers.params), cast(image)
    program = jax.jit(lambda params, x: peers.model.apply({"params": params}, x)).lower(params, x).compile()
    layout = dict(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    y = torch.from_numpy(image).permute(0, 3, 1, 2).to(**layout)
    peer = peers.torch.to(**layout)

    @torch.inference_mode()
    def run_torch():
        return peer(y)

    return {"JAX": lambda: program(params, x), "PyTorch": run_torch}


def check(functions: dict[str, Callable[[], Any]], dtype: str) -> None:
    """Raises ArithmeticError unless both answer alike."""
    ours = np.asarray(functions["JAX"](), np.float32)
    theirs = functions["PyTorch"]().float().permute(0, 2, 3, 1).numpy()
    error = np.abs(ours - theirs).max() / np.ptp(theirs)
    if not error < _TOLERANCE[dtype]:
        raise ArithmeticError(f"{dtype}: JAX and PyTorch differ by {error:.1e} of the span; nothing was timed")


def attention_share(model: RLFN, size: Size, rounds: int) -> Paired:
    """Times of one RLFB and of its attention alone, on random features, float32."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, model.channels)), jnp.float32)
    functions = {}
    parts = {"block": RLFB(model.channels, model.mid, model.esa_features), "attention": ESA(model.esa_features, 1)}
    for name, part in parts.items():
        params = jax.jit(part.init)(jax.random.key(0), x)
        program = jax.jit(part.apply).lower(params, x).compile()
        functions[name] = lambda program=program, params=params: program(params, x)
    return paired(functions, rounds)


def rows(name: str, size: Size, dtype: str, times: Paired) -> list[Row]:
    """Both times and their paired ratio."""
    setting = f"{size[0]} x {size[1]}, {dtype}, batch 1, {times.cores} threads, load {max(times.load):.1f}"
    found = []
    for library, seconds in times.seconds.items():
        value = float(np.median(seconds)) * 1e3
        found.append(Row(name, setting, f"time, {library}", "ms", value, *median_interval(seconds * 1e3)))
    return [*found, Row(name, setting, "speedup over PyTorch", "", *times.speedup("JAX", "PyTorch"))]


def measure(weights: pathlib.Path, sizes: list[Size], rounds: int) -> list[Row]:
    """Rows of all networks, sizes and dtypes, and the share of RLFN's attention."""
    found = []
    for size in sizes:
        image = np.random.default_rng(0).uniform(0, 1, (1, *size, 3)).astype(np.float32)
        for name in NETWORKS:
            for dtype in DTYPES:
                peers = load(name, weights)
                functions = runs(peers, image * np.float32(peers.model.data_range), dtype)
                check(functions, dtype)
                found += rows(name, size, dtype, paired(functions, rounds))
        times = attention_share(RLFN(), size, rounds)
        share = times.speedup("block", "attention")  # time(attention) / time(block)
        found.append(Row("RLFN", f"{size[0]} x {size[1]}, one block, float32", "attention's share of time", "", *share))
    return found


def departures(found: list[Row]) -> list[str]:
    """What the numbers say, and what they do not."""
    ratios = {(row.method, row.setting): row.value for row in found if row.metric == "speedup over PyTorch"}
    slower = [f"{method} at {setting}" for (method, setting), ratio in ratios.items() if ratio < 1]
    verdict = f"JAX is slower than PyTorch for {'; '.join(slower)}." if slower else "JAX is faster in every row."
    return [
        verdict,
        "Both libraries use all cores; where the load exceeds the cores, other processes may disturb their thread pools "
        "unequally: repeat on an idle machine before relying on a ratio.",
        "The papers' times are of PyTorch on GPUs and are not compared.",
    ]


def parse_size(text: str) -> Size:
    """HEIGHTxWIDTH."""
    height, width = map(int, text.split("x"))
    return height, width


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_list("sizes", ["256x256", "339x510"], "Low-resolution inputs, HEIGHTxWIDTH.")
    flags.DEFINE_integer("rounds", 5, "Timed runs of each, interleaved.", lower_bound=1)
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Measures and writes the card `sr_speed`."""
    del argv
    start, args = time.monotonic(), flags.FLAGS
    if "JAXCOMP_DATA" not in os.environ:
        raise SystemExit("sr_speed: set JAXCOMP_DATA to a folder that holds sr/weights/*.safetensors")
    weights = pathlib.Path(os.environ["JAXCOMP_DATA"]) / "sr" / "weights"
    found = measure(weights, [parse_size(text) for text in args.sizes], args.rounds)
    paper = "RLFN: Kong et al., CVPRW 2022, arXiv 2205.07514; IMDN: Hui et al., 2019, arXiv 1909.11856"
    command = "JAXCOMP_DATA=FOLDER " + shlex.join(["python", "-m", "experiments.sr_speed", *sys.argv[1:]])
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}"
    minutes = (time.monotonic() - start) / 60
    card = Card("sr_speed", paper, command, current_commit(), device, minutes, [0], found, departures(found))
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    app.run(main)
