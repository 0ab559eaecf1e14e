"""Times RLFN, RLFN of NTIRE 2022 and IMDN against PyTorch with the same weights, in turns on one machine.

    JAXCOMP_DATA=FOLDER python -m experiments.sr_speed [--sizes=256x256,339x510] [--rounds=5] [--out=experiments/results]

339 x 510 is a DIV2K validation image at x4. On a CPU, JAX runs every network as Flax has it and under
`jaxcomp.deploy.cpu_convolutions`, with XLA's convolution and with the C++ kernel; on a GPU, as Flax has it. Before it is timed
every form must answer as PyTorch does, which runs on the same device in channels-last layout, on a GPU (or with --compile) under
torch.compile too. Needs the extra `parity` and, on a CPU, a C++ compiler. About 7 minutes on two CPU cores.
"""

import functools
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
from experiments.sr_speed_card import BEST, COMPILED, PEER, PLAIN, REST, Size, best_of, departures, rows
from jaxcomp.core.apply import compressed
from jaxcomp.core.transform import Transform, compress, identity
from jaxcomp.deploy import cpu_convolutions, fuse_convolutions
from jaxcomp.evaluate.throughput import Paired, paired
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.models.rlfn import RLFB, RLFN
from jaxcomp.models.sr_blocks import ESA

NETWORKS = {
    "RLFN": ("rlfn_x4", "rlfn_x4", lambda: torch_sr.RLFN(52, 52, 6, 4)),
    "RLFN, NTIRE 2022": ("rlfn_ntire_x4", "rlfn_ntire_x4", lambda: torch_sr.RLFN(46, 48, 4, 4)),
    "IMDN, NTIRE 2022": ("imdn_ntire_x4", "ntire2022_imdn_baseline", torch_sr.IMDN),
}


class Form(NamedTuple):
    """How a network is run: a rewrite of its weights, then one of its program."""

    transform: Transform
    program: Callable[[Callable], Callable] = lambda run: run


FORMS = {
    PLAIN: Form(identity()),
    "aligned channels": Form(cpu_convolutions(native=False)),
    "C++ convolutions": Form(cpu_convolutions(native=True)),
    BEST: Form(cpu_convolutions(native=True), fuse_convolutions),
}
DTYPES = ("float32", "bfloat16")
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of the output's span
_TENSOR_FLOAT = 1e-2  # the same on a GPU, where both libraries may multiply float32 in TF32


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


def on_cpu() -> bool:
    """Whether JAX runs on a CPU; PyTorch runs where JAX does."""
    return jax.default_backend() == "cpu"


def forms() -> dict[str, Form]:
    """The forms that make a difference on this device."""
    return FORMS if on_cpu() else {PLAIN: FORMS[PLAIN]}


def runs(peers: Peers, image: np.ndarray, dtype: str, compiled: bool) -> dict[str, Callable[[], Any]]:
    """{form, "PyTorch" or "PyTorch, torch.compile": function without arguments} on one image in the network's data range.

    All are compiled; those of PyTorch wait for the device.
    """
    cast = lambda leaf: jnp.asarray(leaf, dtype)
    params, x = jax.tree.map(cast, peers.params), cast(image)
    apply = lambda params, x: peers.model.apply({"params": params}, x)
    functions = {name: program(apply, params, x, form) for name, form in forms().items()}
    options = dict(device="cpu" if on_cpu() else "cuda", dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    y, peer = torch.from_numpy(image).permute(0, 3, 1, 2).to(**options), peers.torch.to(**options)

    @torch.inference_mode()
    def run(module: torch.nn.Module) -> torch.Tensor:
        result = module(y)
        if result.is_cuda:
            torch.cuda.synchronize()
        return result

    modules = {PEER: peer} | ({COMPILED: torch.compile(peer)} if compiled else {})
    return functions | {name: functools.partial(run, module) for name, module in modules.items()}


def check(functions: dict[str, Callable[[], Any]], dtype: str) -> None:
    """Raises ArithmeticError unless all answer as PyTorch does."""
    tolerance = max(_TOLERANCE[dtype], 0.0 if on_cpu() else _TENSOR_FLOAT)
    theirs = as_numpy(functions[PEER]())
    for name, function in functions.items():
        error = np.abs(as_numpy(function()) - theirs).max() / np.ptp(theirs)
        if not error < tolerance:
            raise ArithmeticError(f"{dtype}: {name} and PyTorch differ by {error:.1e} of the span; nothing was timed")


def as_numpy(y: jax.Array | torch.Tensor) -> np.ndarray:
    """An image of either library, float32 [N, H, W, C]."""
    return y.float().permute(0, 2, 3, 1).cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y, np.float32)


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
    rivals = {name: functions[name] for name in (best_of(functions), PEER, COMPILED) if name in functions}
    others = {name: function for name, function in functions.items() if name == PEER or name not in rivals}
    return paired(rivals, rounds, REST), paired(rivals, rounds), paired(others, rounds, REST)


def share_rows(size: Size, rounds: int) -> list[Row]:
    """Which part of an RLFB's time goes where."""
    found = []
    for form, dtype in itertools.product(dict.fromkeys((PLAIN, best_of(forms()))), DTYPES):
        times = block_times(RLFN(), size, rounds, FORMS[form], dtype)
        for part in ("attention", "convolutions"):
            share = times.speedup("block", part)  # time(part) / time(block)
            setting = f"{size[0]} x {size[1]}, {dtype}, one block"
            found.append(Row(f"RLFN: {form}", setting, f"time_share_{part}", "", *share))
    return found


def measure(weights: pathlib.Path, sizes: list[Size], rounds: int, compiled: bool) -> tuple[list[Row], float]:
    """Rows of all networks, sizes and dtypes, the shares of RLFN's parts; and the machine's largest load."""
    found, load_seen = [], 0.0
    for size in sizes:
        image = np.random.default_rng(0).uniform(0, 1, (1, *size, 3)).astype(np.float32)
        for name in NETWORKS:
            for dtype in DTYPES:
                peers = load(name, weights)
                functions = runs(peers, image * np.float32(peers.model.data_range), dtype, compiled)
                check(functions, dtype)
                times = in_turns(functions, rounds)
                found += rows(name, size, dtype, *times)
                load_seen = max(load_seen, *(load for paired_times in times for load in paired_times.load))
        found += share_rows(size, rounds)
    return found, load_seen


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
    flags.DEFINE_boolean("compile", None, "Compare with torch.compile, too; by default on a GPU.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Measures and writes the card `sr_speed`."""
    del argv
    start, args = time.monotonic(), flags.FLAGS
    weights = sr.data_folder("sr/weights/*.safetensors") / "sr" / "weights"
    compiled = not on_cpu() if args.compile is None else args.compile
    found, load_seen = measure(weights, [parse_size(text) for text in args.sizes], args.rounds, compiled)
    paper = "RLFN: Kong et al., CVPRW 2022, arXiv 2205.07514; IMDN: Hui et al., 2019, arXiv 1909.11856"
    command = "JAXCOMP_DATA=FOLDER " + command_line("experiments.sr_speed", sys.argv[1:])
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    device = f"{current_device()}, load {load_seen:.1f}{priority()}, {versions}"
    minutes = (time.monotonic() - start) / 60
    card = Card("sr_speed", paper, command, current_commit(), device, minutes, [0], found, departures(found, on_cpu()))
    card.write(args.out)
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
