"""What `experiments.compress_lm` says: the sections of its report, its files, its summary."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.lm import LanguageModel, Text
from jaxcomp.core.apply import explain, shape_structs
from jaxcomp.core.leaf import nbytes
from jaxcomp.core.report import Report, human_bytes
from jaxcomp.evaluate import Perplexity, bootstrap_perplexity, paired_ratio
from jaxcomp.io.files import replacing

HTML, JSON = "report.html", "report.json"


def quality(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexity with 95 % bootstrap intervals, dense then compressed, and their ratio on the same windows."""
    base, new = (
        Perplexity(np.array(s["nll"]), np.array(s["correct"]), s["tokens_per_window"]) for s in (before, after)
    )
    rows = [
        {"name": name, **bootstrap_perplexity(result)._asdict(), "accuracy": result.accuracy}
        for name, result in (("dense", base), ("compressed", new))
    ]
    ratio = paired_ratio(new, base)._asdict() | {"windows": len(new.nll), "tokens": new.tokens}
    return {"perplexity": rows, "perplexity_ratio": ratio}


def sizes(before: Any, after: Any, folders: Mapping[str, pathlib.Path]) -> list[dict[str, Any]]:
    """Bytes of both trees in memory (global arrays), and of folders on disk; what is absent is left out."""
    memory = {"dense, in memory": nbytes(before), "compressed, in memory": nbytes(after)}
    disk = {f"{name}, on disk": folder_bytes(folder) for name, folder in folders.items()}
    rows = (memory | disk).items()
    return [{"what": what, "size": human_bytes(count), "bytes": count} for what, count in rows if count]


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kernels(lm: LanguageModel, params: Any, text: Text) -> list[dict[str, Any]]:
    """Which kernel consumes how many leaves, for a window and for one token, by `explain`."""
    leaves: dict[tuple[str, str, str], set[str]] = {}
    for tokens, window in {"a window": text.calibration[:1], "one token": text.calibration[:1, :1]}.items():
        for event in explain(lm.apply, params, shape_structs(window)).events:
            leaves.setdefault((tokens, event.primitive, event.kernel), set()).add(event.leaf)
    return [{"of": t, "primitive": p, "kernel": k, "leaves": len(found)} for (t, p, k), found in leaves.items()]


def write(result: Report, out: pathlib.Path) -> None:
    """Writes both report files atomically."""
    if jax.process_index() == 0:
        for name, content in ((JSON, result.to_json()), (HTML, result.to_html("Compression of a language model"))):
            with replacing(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")


def summary(result: Report, out: pathlib.Path) -> Table:
    """The numbers that matter, for the terminal."""
    table = Table(title=f"{out}/{HTML}", show_header=False)
    before, after = result.sections["perplexity"]
    interval = "{value:.2f} [{low:.2f}, {high:.2f}]"
    table.add_row("perplexity", f"{interval.format(**before)} -> {interval.format(**after)}")
    table.add_row("ratio, paired", "{value:.4f} [{low:.4f}, {high:.4f}]".format(**result.sections["perplexity_ratio"]))
    table.add_row("in memory", f"{human_bytes(result.bytes_before)} -> {human_bytes(result.bytes_after)}")
    table.add_row("bits per compressed weight", f"{result.bits_per_weight:.2f}")
    if "decoding_paired" in result.sections:
        facts = result.sections["decoding_paired"]
        speeds = " -> ".join(f"{row['tokens_per_second']:.0f}" for row in result.sections["decoding"])
        ratio = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**facts["speedup"])
        table.add_row("decoding, tokens/s", f"{speeds}, speedup {ratio} ({facts['machine_load']})")
    for row in result.sections["size"][2:]:
        table.add_row(row["what"], row["size"])
    return table
