"""Progress of long work: a bar on a terminal, one line per stage otherwise, silence under `JAXCOMP_QUIET=1`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def track(items: Sequence | Iterable, stage: str, total: int | None = None) -> Iterator:
    """Yields `items` and shows how far the stage is. Short stages without a terminal print nothing."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    console = Console(stderr=True)
    if os.environ.get("JAXCOMP_QUIET") == "1":
        yield from items
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=stage)
    else:
        start = time.perf_counter()
        yield from items
        if (seconds := time.perf_counter() - start) > 5:
            print(f"{stage}: {total if total is not None else ''} in {seconds:.1f} s", file=sys.stderr, flush=True)
