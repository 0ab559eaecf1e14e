"""The NTIRE 2022 efficient super-resolution harness: what RLFN, RFDN and IMDN cost here, and the printed table re-ranked.

    python -m experiments.ntire_esr [--size=256] [--rounds=9] [--out=experiments/results]

Counts and PSNR rank as in the challenge (arXiv 2205.05675); time and memory are this machine's, comparable only among the
three. Needs no data: costs do not depend on the weights. With `JAXCOMP_DATA` set the published weights are also scored on
Set5. About 3 minutes on two CPU cores.
"""

import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import sr
from experiments.cards import Card, Row, current_commit
from experiments.runs import launch
from jaxcomp.data.bicubic import imresize
from jaxcomp.evaluate.challenge import (
    Entry,
    Ranks,
    printed_baselines,
    printed_entries,
    printed_ranks,
    rank,
)
from jaxcomp.evaluate.complexity import Complexity, complexity
from jaxcomp.evaluate.restoration import restorer
from jaxcomp.evaluate.throughput import Paired, paired, program_memory
from jaxcomp.io.super_resolution import load_super_resolver
from jaxcomp.models.imdn import IMDN
from jaxcomp.models.rfdn import RFDN
from jaxcomp.models.rlfn import rlfn_ntire

NETWORKS = {"RLFN": rlfn_ntire, "RFDN": RFDN, "IMDN": IMDN}
WEIGHTS = {
    "RLFN": ("rlfn_ntire_x4", "rlfn_ntire_x4.safetensors"),
    "RFDN": ("rfdn_ntire_x4", "ntire2022_rfdn_baseline.safetensors"),
    "IMDN": ("imdn_ntire_x4", "ntire2022_imdn_baseline.safetensors"),
}
PAPER = "RLFN, paper's 6 blocks"
SCORED = WEIGHTS | {PAPER: ("rlfn_x4", "rlfn_x4.safetensors")}
SET5_OF_PAPER = {(PAPER, "y"): (32.24, 0.8952)}
TRACKS = ("main", "complexity", "overall")
ERRATUM = (
    "Alpan and MegSR both score 18 in the complexity track; the paper prints ranks 10 and 9, by its own rule of shared "
    "ranks both are 9. All other 104 printed ranks of the 35 teams are reproduced; where rounded figures are equal the "
    "printed rank of that cost decides."
)
DEPARTURES = (
    ERRATUM,
    "Time and memory are those of XLA on this machine, on one random image: the paper's are of PyTorch on a Titan Xp "
    "over whole DIV2K images. They are ranked among the three networks only.",
    "PSNR on DIV2K is the organisers' figure: its test images are not public.",
)


class Measured(NamedTuple):
    """Costs of the networks by name; memory in bytes."""

    complexity: dict[str, Complexity]
    memory: dict[str, int]
    times: Paired


def measure(networks: Mapping[str, Callable[[], nn.Module]], size: int, rounds: int) -> Measured:
    """Counts, program memory and interleaved times of every network on one image of `size` x `size`, batch 1."""
    counts, memory, runs = {}, {}, {}
    image = np.random.default_rng(0).uniform(0, 1, (1, size, size, 3)).astype(np.float32)
    for name, network in networks.items():
        model = network()
        apply = lambda params, x, model=model: model.apply({"params": params}, x)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
        x = jnp.asarray(image * model.data_range)
        counts[name] = complexity(apply, params, x)
        program = jax.jit(apply).lower(params, x).compile()
        memory[name] = program_memory(program).peak
        runs[name] = lambda program=program, params=params, x=x: program(params, x)
    return Measured(counts, memory, paired(runs, rounds))


def published() -> dict[str, Entry]:
    """The paper's figures of the three networks; RLFN is team ByteESR's."""
    entries = {entry.name: entry for entry in (*printed_baselines(), *printed_entries())}
    return {"RLFN": entries["ByteESR"], "RFDN": entries["RFDN"], "IMDN": entries["IMDN"]}


def entries(measured: Measured) -> list[Entry]:
    """The networks with costs measured here and the organisers' PSNR."""
    return [
        Entry(
            name,
            published()[name].psnr_val,
            published()[name].psnr_test,
            {
                "time": float(np.median(measured.times.seconds[name])) * 1e3,
                "params": count.params / 1e6,
                "flops": count.flops / 1e9,
                "activations": count.activations / 1e6,
                "memory": measured.memory[name] / 2**20,
            },
        )
        for name, count in measured.complexity.items()
    ]


def quality_rows(data: pathlib.Path) -> list[Row]:
    """PSNR and SSIM of bicubic and of the published weights on Set5 x4, on Y and on RGB."""
    restorers = {"bicubic": lambda low: np.asarray(imresize(low, 4))}
    for name, (model, file) in SCORED.items():
        restorers[name] = restorer(*load_super_resolver(model, data / "sr" / "weights" / file))
    found = []
    for name, restore in restorers.items():
        for score in sr.scores(restore, sr.set5(data), 4):
            paper = SET5_OF_PAPER.get((name, score.channel), (None, None))
            found += sr.quality_rows(name, "set5 x4", score, paper=paper)
    return found


def rows(measured: Measured, ranks: Mapping[str, Ranks], size: int) -> list[Row]:
    """Costs and ranks; counts beside the paper's figures where the input is the challenge's."""
    setting, result = f"{size} x {size}, batch 1, float32", []
    for entry in entries(measured):
        name, costs = entry.name, entry.costs
        paper = published()[name].costs if size == 256 else {}
        counts = [("params", "params_M", "M"), ("flops", "flops_G", "G"), ("activations", "activations_M", "M")]
        result += [
            Row(name, setting, *sr.exact(metric, unit, costs[cost]), paper.get(cost)) for cost, metric, unit in counts
        ]
        measures = [
            sr.exact("convolutions", "", measured.complexity[name].convs),
            sr.exact("memory_MB", "MiB", costs["memory"]),
            ("runtime_ms", "ms", *sr.median_interval(measured.times.seconds[name] * 1e3)),
            ("speedup_vs_imdn", "", *measured.times.speedup(name, "IMDN")),
            *(sr.exact(f"rank_{track}", "", getattr(ranks[name], track)) for track in TRACKS),
        ]
        result += [Row(name, setting, *measure) for measure in measures]
    return result


def table_of_ranks(ranks: Mapping[str, Ranks]) -> Table:
    """The three tracks among the networks that ran here."""
    table = Table("network", *TRACKS, title="tracks on this machine")
    for name, found in ranks.items():
        table.add_row(name, *(str(getattr(found, track)) for track in TRACKS))
    return table


def table_of_printed_ranks() -> Table:
    """The 35 teams re-ranked from their figures; ranks that differ from the printed ones show both."""
    found, paper = rank(printed_entries()), printed_ranks()
    table = Table("team", "time (ms)", "params (M)", "FLOPs (G)", "main", "complexity", "overall")
    costs = {entry.name: entry.costs for entry in printed_entries()}
    for name, ours in found.items():
        cells = [
            f"{mine}" if mine == theirs else f"{mine} (printed: {theirs})"
            for mine, theirs in zip(ours[:3], paper[name][:3], strict=True)
        ]
        figures = [f"{costs[name][cost]:.5g}" for cost in ("time", "params", "flops")]
        table.add_row(name, *figures, *cells)
    return table


def run(size: int, rounds: int, data: pathlib.Path | None, command: str) -> Card:
    """Measures, ranks, prints the tracks, and scores on Set5 where there are data."""
    start = time.monotonic()
    measured = measure(NETWORKS, size, rounds)
    ranks = rank(entries(measured))
    Console().print(table_of_ranks(ranks))
    found = rows(measured, ranks, size) + (quality_rows(data) if data else [])
    load, cores = max(measured.times.load), measured.times.cores
    device = f"{jax.devices()[0].device_kind}, {cores} cores, load {load:.1f}, jax {jax.__version__}"
    flags_of = [f"{name}: {flag}" for name, count in measured.complexity.items() for flag in count.flags]
    busy = f"The machine was busy (load {load:.1f} on {cores} cores): times are disturbed, their paired ratios less so."
    departures = (*DEPARTURES, *flags_of, *([busy] if load > cores else []))
    minutes = (time.monotonic() - start) / 60
    paper = "NTIRE 2022 Challenge on Efficient Super-Resolution: Methods and Results, CVPRW 2022, arXiv 2205.05675"
    return Card("ntire2022_esr", paper, command, current_commit(), device, minutes, [0], found, departures)


def define_flags() -> None:
    """The flags of the script."""
    flags.DEFINE_integer("size", 256, "Height and width of the low-resolution input; the challenge's is 256.")
    flags.DEFINE_integer("rounds", 9, "Timed runs of each network, interleaved.")
    flags.DEFINE_string("out", "experiments/results", "Folder of the result card.")


def main(argv) -> None:
    """Prints both tables and writes the card."""
    del argv
    data = os.environ.get("JAXCOMP_DATA")
    command = shlex.join(["python", "-m", "experiments.ntire_esr", *sys.argv[1:]])
    command = f"JAXCOMP_DATA=FOLDER {command}" if data else command
    card = run(flags.FLAGS.size, flags.FLAGS.rounds, pathlib.Path(data) if data else None, command)
    card.write(flags.FLAGS.out)
    Console().print(table_of_printed_ranks())
    print(card.to_markdown())


if __name__ == "__main__":
    define_flags()
    launch(main)
