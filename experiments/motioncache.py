"""MotionCache beside its baselines on an exact field and on the trained video model; writes a result card and a picture.

    python -m experiments.motioncache [--config=configs/diffusion/motioncache.py] [--out=runs/motioncache]

Every run (world, seed, method) is recorded in `--out` when it is done; a killed experiment goes on from there. `--worlds=field`
leaves out the trained model. `--speed` measures wall time again (on an otherwise idle machine).
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import configs.diffusion
from experiments import motioncache_report as pictures
from experiments import motioncache_worlds as worlds
from experiments.cards import Card, Row, current_commit, current_device
from experiments.motioncache_speed import measure
from experiments.runs import define_card_flags, launch
from experiments.stages import Stages
from jaxcomp.io.files import read_json, replacing, write_json

COMMAND = "python -m experiments.motioncache"
FIELD, STILL, MOVING = "exact field", "trained model, still camera", "trained model, moving camera"
WORLDS = {"field": FIELD, "still": STILL, "moving": MOVING}
FLOW, TEA, UNIFORM, X0 = "FlowCache", "TeaCache", "uniform", "MotionCache, x0 estimate, alpha {}"
MARGINS = {0.5: 3.0, 0.35: 1.0, 0.25: 1.5}  # dB over FlowCache that the field must show
PAPER_GAIN = 23.46 - 21.83  # dB over FlowCache, SkyReels-V2, "slow": 27 % of the FLOPs of the uncached model
PAPER_NOTE = "Published: SkyReels-V2 1.3B 540P, slow setting, 30 of 113 PFLOPs, PSNR 23.46 against FlowCache's 21.83"
Results = dict[tuple[str, str, float], list[dict[str, Any]]]  # (world, method, budget) -> one record per seed


def build(config: ConfigDict, name: str, seed: int) -> worlds.World:
    """The world of that name."""
    return worlds.field_world(config, seed) if name == FIELD else worlds.video_world(config, seed, name == MOVING)


def run_all(config: ConfigDict, names: Sequence[str], stages: Stages) -> Results:
    """All runs, recorded one by one."""
    results: Results = {}
    for name in names:
        for seed in config.seeds if name == FIELD else config.video.seeds:
            cache: dict[str, Any] = {}

            def world(name=name, seed=seed, cache=cache):
                if not cache:
                    cache["world"] = build(config, name, seed)
                    cache["reference"] = worlds.reference(cache["world"])
                return cache["world"], cache["reference"]

            for method_name, method in worlds.methods(config).items():
                work = lambda m=method, w=world, n=name: one_method(config, n, *w(), m)
                record = stages.run(f"{name}, seed {seed}, {method_name}", work)
                for budget, found in zip(config.budgets, record, strict=True):
                    results.setdefault((name, method_name, budget), []).append(found)
    return results


def one_method(
    config: ConfigDict, name: str, world: worlds.World, found: worlds.Reference, method: worlds.Method
) -> list[dict[str, Any]]:
    """The best run within each budget over thresholds and kinds of reuse; JSON-able."""
    part = "field" if name == FIELD else "video"
    count = config[part].get("threshold_count", config.threshold_count)
    scores: dict[tuple[str, float], worlds.Score] = {}
    start = time.monotonic()
    for reuse in config.reuses[part]:
        for threshold in worlds.thresholds(method, config.threshold_range, count, found.table)[::-1].tolist():
            scores[reuse, threshold] = worlds.score(world, found, method, reuse, threshold)
            if scores[reuse, threshold].share > max(config.budgets):
                break  # smaller ones compute more
    records = []
    for budget in config.budgets:
        best = worlds.best(list(scores.values()), budget)
        reuse, threshold = next(key for key, value in scores.items() if value is best)
        record = {"psnr": best.psnr.round(4).tolist(), "share": best.share, "reuse": reuse, "threshold": threshold}
        records.append(record | {"seconds": (time.monotonic() - start) / len(config.budgets)})
    return records


def interval(samples: Sequence[float], draws: int = 4000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap over videos of all seeds."""
    samples = np.asarray(samples, np.float64).ravel()
    rng = np.random.default_rng(0)
    means = samples[rng.integers(len(samples), size=(draws, len(samples)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(samples.mean())
    return mean, min(float(low), mean), max(float(high), mean)


def gain(results: Results, name: str, method: str, budget: float, base: str = FLOW) -> tuple[float, float, float]:
    """Interval of the PSNR over that of a base, video by video, in dB."""
    pairs = zip(results[name, method, budget], results[name, base, budget], strict=True)
    return interval(np.concatenate([np.subtract(a["psnr"], b["psnr"]) for a, b in pairs]))


def rows(results: Results, speed: Mapping[str, Any]) -> list[Row]:
    """The card's rows."""
    out = []
    for (name, method, budget), records in results.items():
        setting = f"{name}, at most {budget:.0%} of the tokens"
        psnr = np.concatenate([r["psnr"] for r in records])
        note = "; ".join(sorted({f"{r['reuse']} reused" for r in records}))
        out.append(Row(method, setting, "psnr to the uncached run", "dB", *interval(psnr), note=note))
        shares = np.sort([r["share"] for r in records])
        ends = float(shares[0]), float(shares[-1])
        out.append(Row(method, setting, "computed tokens", "", float(np.clip(shares.mean(), *ends)), *ends))
        if method != FLOW:
            published = PAPER_GAIN if name != FIELD and method.endswith("program)") and budget == 0.25 else None
            note = PAPER_NOTE if published else ""
            found = gain(results, name, method, budget)
            out.append(Row(method, setting, "gain over FlowCache", "dB", *found, published, note))
    for part, metric in (("forward", "time / time of a forward of all tokens"), ("run", "speedup")):
        out += [Row(name, speed["setting"], metric, "", *found) for name, found in speed.get(part, {}).items()]
    return out


def verdicts(results: Results, config: ConfigDict) -> list[str]:
    """Which bars are met, from the numbers."""
    out = []
    for budget, margin in MARGINS.items():
        method = X0.format(config.floors[0])
        if (FIELD, method, budget) in results:
            value, low, high = gain(results, FIELD, method, budget)
            text = f"{value:+.1f} dB [{low:+.1f}, {high:+.1f}] against a bar of {margin:+.1f}"
            out.append(
                f"Exact field, {budget:.0%}: {method} {'meets' if value >= margin else 'MISSES'} the bar: {text}."
            )
    out += beside_teacache(results, config)
    for name in (STILL, MOVING):
        for budget in config.budgets:
            tried = {m for n, m, b in results if (n, b) == (name, budget) and m.startswith("MotionCache")}
            if tried:
                best = max(sorted(tried), key=lambda m: gain(results, name, m, budget)[0])
                bases = [base for base in (FLOW, TEA, UNIFORM) if (name, base, budget) in results]
                found = [f"{base} {in_words(gain(results, name, best, budget, base))}" for base in bases]
                out.append(
                    f"{name}, {budget:.0%}: the best of {len(tried)} settings ({best}) against {', '.join(found)}."
                )
    return out


def in_words(found: tuple[float, float, float]) -> str:
    """A gain in words."""
    value, low, high = found
    verdict = "ahead" if low > 0 else "on a par" if high >= 0 else "BEHIND"
    return f"{value:+.2f} dB [{low:+.2f}, {high:+.2f}]: {verdict}"


def beside_teacache(results: Results, config: ConfigDict) -> list[str]:
    """The x0 estimate against the chunk-wise cache that starts without warm-up, on the field."""
    out = []
    for budget in config.budgets:
        tried = [m for n, m, b in results if (n, b) == (FIELD, budget) and m.startswith("MotionCache, x0")]
        if (FIELD, TEA, budget) in results and tried:
            best = max(tried, key=lambda m: gain(results, FIELD, m, budget)[0])
            found = [(m, gain(results, FIELD, m, budget, TEA)) for m in (X0.format(config.floors[0]), best)]
            text = "; ".join(f"{method}, {in_words(value)}" for method, value in found)
            out.append(f"Exact field, {budget:.0%}, over TeaCache, which has no warm-up of 5 steps: {text}.")
    return out


def card(config: ConfigDict, results: Results, speed: Mapping[str, Any]) -> Card:
    """The result card."""
    departures = [
        "The models are an exact field of independent tokens and a video DiT of 0.35 M parameters on moving shapes, not "
        "SkyReels-V2 or MAGI-1; PSNR is to the uncached run of the same model.",
        "All methods share one table of distances, measured on the uncached run of the world; the published programs use a "
        "polynomial of the time modulation (SkyReels-V2) or the embedded input (MAGI-1).",
        "Each method takes its best threshold within the budget, FlowCache too; every budget counts the places of a capacity "
        "that padding fills. All reuse the network's output, as MAGI-1's program does; SkyReels-V2's reuses the residual of "
        "the trunk.",
        "Chunks are integrated by Euler steps, not UniPC.",
        *verdicts(results, config),
    ]
    seconds = sum(record["seconds"] for records in results.values() for record in records)
    return Card(
        name="motioncache",
        paper="Motion-Aware Caching for Efficient Autoregressive Video Generation (arXiv 2605.01725)",
        command=COMMAND,
        commit=current_commit(),
        device=current_device(),
        minutes=seconds / 60,
        seeds=list(config.seeds),
        rows=rows(results, speed),
        departures=departures,
    )


def speed_of(file: pathlib.Path, config: ConfigDict, again: bool) -> Mapping[str, Any]:
    """What `measure` found, now or before; nothing if it never ran."""
    if again:
        found = measure(config.speed)
        with replacing(file) as temporary:
            write_json(temporary, found)
    return read_json(file) if file.exists() else {}


def draw(folder: pathlib.Path, config: ConfigDict, names: Sequence[str], results: Results) -> None:
    """The pictures of the card."""
    pictures.curves(folder / "motioncache.png", results, config)
    if STILL in names:
        name = X0.format(config.floors[-1])
        world = build(config, STILL, config.seeds[0])
        chosen = worlds.methods(config)[name].config
        chosen = dataclasses.replace(chosen, proxy="x0", floor=config.floors[-1])
        threshold = results[STILL, name, config.budgets[1]][0]["threshold"]
        pictures.weight_maps(folder, world, worlds.reference(world), worlds.video_model()[1], chosen, threshold)


def chosen_worlds(names: Sequence[str]) -> list[str]:
    """The worlds of these names. Raises ValueError for an unknown one, or none."""
    if not names or not set(names) <= WORLDS.keys():
        raise ValueError(f"--worlds: expected some of {', '.join(WORLDS)}, found {','.join(names)!r}")
    return [world for name, world in WORLDS.items() if name in names]


def main(argv) -> None:
    """Runs what is missing, writes the card and the picture."""
    del argv
    args = flags.FLAGS
    config = args.config
    names = chosen_worlds(args.worlds)
    stages = Stages(args.out, config.to_dict() | {"jax": jax.__version__}, ("speed.json",), args.overwrite)
    results = run_all(config, names, stages)
    speed = speed_of(pathlib.Path(args.out) / "speed.json", config, args.speed)
    card(config, results, speed).write(args.results)
    draw(pathlib.Path(args.results), config, names, results)
    print(f"{args.results}/motioncache.md")


if __name__ == "__main__":
    define_card_flags(pathlib.Path(configs.diffusion.__file__).parent / "motioncache.py", "runs/motioncache")
    flags.DEFINE_list("worlds", list(WORLDS), "Where to compare: field, still (camera), moving.")
    flags.DEFINE_boolean("speed", False, "Measure wall time.")
    launch(main)
