"""Times RLFN, RLFN of NTIRE 2022 and IMDN against PyTorch with the same weights, in turns on one machine.

    JAXCOMP_DATA=FOLDER python -m experiments.sr_speed [--sizes=256x256,339x510] [--rounds=5] [--out=experiments/results]

339 x 510 is a DIV2K validation image at x4. JAX runs every network as Flax has it and under `jaxcomp.deploy.cpu_convolutions`,
with XLA's convolution and with the C++ kernel. Before it is timed every form must answer as PyTorch does, which runs in
channels-last layout, without torch.compile. Needs the extra `parity` and a C++ compiler. About 4 minutes on two CPU cores.
"""

import itertools
import os
import pathlib
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
from absl import flags

from experiments import sr, torch_sr
from experiments.cards import Card, Row, command_line, current_commit, current_device
from experiments.runs import launch
from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import Transform, compress, identity
from jaxcomp.deploy import cpu_convolutions, fuse_convolutions
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
PEER = "PyTorch"
BEST = "C++ convolutions, fused"


class Form(NamedTuple):
    """How a network is run: a rewrite of its weights, then one of its program."""

    transform: Transform
    program: Callable[[Callable], Callable] = lambda run: run


FORMS = {
    "plain Flax": Form(identity()),
    "aligned channels": Form(cpu_convolutions(native=False)),
    "C++ convolutions": Form(cpu_convolutions(native=True)),
    BEST: Form(cpu_convolutions(native=True), fuse_convolutions),
}
DTYPES = ("float32", "bfloat16")
REST = 0.05  # seconds before each call: the threads of PyTorch's OpenMP spin for some milliseconds after its calls
SPEEDUP, HURRIED = "speedup_vs_pytorch", "speedup_without_rest"
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


def program(apply: Callable, params: Any, x: jax.Array, form: Form) -> Callable[[], jax.Array]:
    """The compiled `apply(params, x)` in a form, without arguments."""
    params, _, _ = compress(form.transform, params)
    run = jax.jit(form.program(compressed(apply))).lower(params, x).compile()
    return lambda: run(params, x)


def runs(peers: Peers, image: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    """{form or "PyTorch": function without arguments} on one image in the network's data range; all compiled or warm."""
    cast = lambda leaf: jnp.asarray(leaf, dtype)
    params, x = jax.tree.map(cast, peers.params), cast(image)
    apply = lambda params, x: peers.model.apply({"params": params}, x)
    functions = {name: program(apply, params, x, form) for name, form in FORMS.items()}
    layout = dict(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    y = torch.from_numpy(image).permute(0, 3, 1, 2).to(**layout)
    peer = peers.torch.to(**layout)

    @torch.inference_mode()
    def run_torch():
        return peer(y)

    return functions | {PEER: run_torch}


def check(functions: dict[str, Callable[[], Any]], dtype: str) -> None:
    """Raises ArithmeticError unless all answer as PyTorch does."""
    theirs = functions[PEER]().float().permute(0, 2, 3, 1).numpy()
    for name, function in functions.items():
        error = 0.0 if name == PEER else np.abs(np.asarray(function(), np.float32) - theirs).max() / np.ptp(theirs)
        if not error < _TOLERANCE[dtype]:
            raise ArithmeticError(f"{dtype}: {name} and PyTorch differ by {error:.1e} of the span; nothing was timed")


def block_times(model: RLFN, size: Size, rounds: int, form: Form, dtype: str) -> Paired:
    """Times of one RLFB, of its attention and of its convolutions alone, on random features."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, model.channels)), dtype)
    convolutions = nn.Sequential([nn.Conv(model.channels, (3, 3)) for _ in range(3)])
    block = RLFB(model.channels, model.mid, model.esa_features)
    parts = {"block": block, "attention": ESA(model.esa_features, 1), "convolutions": convolutions}
    initial = lambda part: jax.tree.map(lambda p: p.astype(dtype), jax.jit(part.init)(jax.random.key(0), x))
    return paired({name: program(part.apply, initial(part), x, form) for name, part in parts.items()}, rounds)


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> tuple[Paired, Paired, Paired]:
    """Times of the best form and PyTorch, of both without a rest, of the other forms and PyTorch.

    What one leaves in memory disturbs the next.
    """
    best, others = {BEST: functions[BEST], PEER: functions[PEER]}, {k: v for k, v in functions.items() if k != BEST}
    return paired(best, rounds, REST), paired(best, rounds), paired(others, rounds, REST)


def rows(name: str, size: Size, dtype: str, best: Paired, hurried: Paired, others: Paired) -> list[Row]:
    """All times and their paired ratios to PyTorch's, whose own times are those beside the best form."""
    setting, found = f"{size[0]} x {size[1]}, {dtype}, batch 1, {best.cores} threads", []
    for times in (best, others):
        for form, seconds in times.seconds.items():
            method = f"{name}: {form}"
            if form != PEER or times is best:
                found.append(Row(method, setting, "runtime_ms", "ms", *sr.median_interval(seconds * 1e3)))
            if form != PEER:
                found.append(Row(method, setting, SPEEDUP, "", *times.speedup(form, PEER)))
    found.append(Row(f"{name}: {BEST}", setting, HURRIED, "", *hurried.speedup(BEST, PEER)))
    return found


def share_rows(size: Size, rounds: int) -> list[Row]:
    """Which part of an RLFB's time goes where."""
    found = []
    for form, dtype in itertools.product(("plain Flax", BEST), DTYPES):
        times = block_times(RLFN(), size, rounds, FORMS[form], dtype)
        for part in ("attention", "convolutions"):
            share = times.speedup("block", part)  # time(part) / time(block)
            setting = f"{size[0]} x {size[1]}, {dtype}, one block"
            found.append(Row(f"RLFN: {form}", setting, f"time_share_{part}", "", *share))
    return found


def measure(weights: pathlib.Path, sizes: list[Size], rounds: int) -> tuple[list[Row], float]:
    """Rows of all networks, sizes and dtypes, the shares of RLFN's parts; and the machine's largest load."""
    found, load_seen = [], 0.0
    for size in sizes:
        image = np.random.default_rng(0).uniform(0, 1, (1, *size, 3)).astype(np.float32)
        for name in NETWORKS:
            for dtype in DTYPES:
                peers = load(name, weights)
                functions = runs(peers, image * np.float32(peers.model.data_range), dtype)
                check(functions, dtype)
                times = in_turns(functions, rounds)
                found += rows(name, size, dtype, *times)
                load_seen = max(load_seen, *(load for paired_times in times for load in paired_times.load))
        found += share_rows(size, rounds)
    return found, load_seen


def departures(found: list[Row]) -> list[str]:
    """What the numbers say, and what they do not."""
    best = [row for row in found if row.metric == SPEEDUP and row.method.endswith(BEST)]
    slower = [f"{row.method} at {row.setting} ({row.value:.2f}x)" for row in best if row.value < 1]
    verdict = f"Slower than PyTorch: {'; '.join(slower)}." if slower else f"JAX with {BEST} is faster in every row."
    return [
        verdict,
        "Where the time of plain Flax goes: XLA's CPU convolution loses a third of its speed where the output channels are no "
        "multiple of 16 (RLFN has 52, 46), runs a 1 x 1 window as a window, and turns bfloat16 into float32.",
        "What was done: the C++ convolution reads maps where they are, multiplies bfloat16 in pairs, packs the 4 channels beyond "
        "48 of four pixels into one vector, steps over pixels, and fetches ahead what it will read, join and overwrite. XLA runs "
        "what lies between such calls in passes of their own; fused, the call adds the bias, activates, joins the residual, adds "
        "the resized attention or gates by the sigmoid, stage by stage over a tile of sums, and reads IMDN's splits and "
        "concatenations in place. What is left beside the convolutions is the max pooling of RLFN's attention at half the "
        "resolution (2 % of its time), and the pixel shuffle (2 %; done in the last convolution's store it costs as much there).",
        "Maps of tens of megabytes are fresh memory in most runs of either library, and page faults a part of all times: up to "
        "half of PyTorch's in float32 on the large image; the C++ calls ask for huge pages. With an allocator that keeps what is "
        "freed (glibc: MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) PyTorch gains more than JAX, and the ratios shrink.",
        "Both libraries use all cores; where the load exceeds the cores, other processes may disturb their thread pools "
        "unequally: repeat on an idle machine before relying on a ratio.",
        f"Before every timed call {REST * 1e3:.0f} ms pass: right after a call the threads of its library still spin for some "
        f"milliseconds and share the cores with the next call. {HURRIED} is the ratio of calls that follow one another at once.",
        "The papers' times are of PyTorch on GPUs and are not compared.",
    ]


def priority() -> str:
    """What the card says of a process that the others of the machine's load do not disturb."""
    real_time = {getattr(os, name, None) for name in ("SCHED_FIFO", "SCHED_RR")}
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    return " at real-time priority" if policy is not None and policy in real_time else ""


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
        raise ValueError("set JAXCOMP_DATA to a folder that holds sr/weights/*.safetensors")
    weights = pathlib.Path(os.environ["JAXCOMP_DATA"]) / "sr" / "weights"
    found, load_seen = measure(weights, [parse_size(text) for text in args.sizes], args.rounds)
    paper = "RLFN: Kong et al., CVPRW 2022, arXiv 2205.07514; IMDN: Hui et al., 2019, arXiv 1909.11856"
    command = "JAXCOMP_DATA=FOLDER " + command_line("experiments.sr_speed", sys.argv[1:])
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    device = f"{current_device()}, load {load_seen:.1f}{priority()}, {versions}"
    minutes = (time.monotonic() - start) / 60
    card = Card("sr_speed", paper, command, current_commit(), device, minutes, [0], found, departures(found))
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
