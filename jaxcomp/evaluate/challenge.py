"""Ranking of the NTIRE 2022 challenge on efficient super-resolution (arXiv 2205.05675) and its printed results.

PSNR only decides who takes part. The main track ranks time; the complexity track the sum of the ranks of params and FLOPs;
the overall track the sum of the ranks of all five costs. Equal sums share the better rank and the next ranks stay empty.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcomp.data.text import ASSETS
from jaxcomp.io.files import read_json

PATH = ASSETS / "sr" / "ntire2022_esr.json"
COSTS = ("time", "params", "flops", "activations", "memory")
MIN_PSNR_VAL, MIN_PSNR_TEST = 28.95, 28.65  # inferred from who was ranked; the rules say 29.00 dB on validation


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
      name: of the team or network.
      psnr_val: RGB PSNR on DIV2K validation, dB.
      psnr_test: the same on DIV2K test.
      costs: the five `COSTS`, each in one unit for all entries; less is better.
      order: decides between equal costs, for figures that are known rounded only.
    """

    name: str
    psnr_val: float
    psnr_test: float
    costs: dict[str, float]
    order: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def eligible(self) -> bool:
        """True if the PSNR is good enough to be ranked."""
        return self.psnr_val >= MIN_PSNR_VAL and self.psnr_test >= MIN_PSNR_TEST


class Ranks(NamedTuple):
    """Ranks in the three tracks, 1 is best, and the sums behind two of them."""

    main: int
    complexity: int
    overall: int
    complexity_score: int
    overall_score: int


def rank(entries: Sequence[Entry]) -> dict[str, Ranks]:
    """Ranks of the eligible entries by name, in the order of the main track.

    Raises:
      ValueError: two entries share a name, or one lacks a cost.
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"names must differ, found {sorted(entry.name for entry in entries)}")
    for entry in entries:
        if set(entry.costs) != set(COSTS):
            raise ValueError(f"{entry.name}: expected the costs {COSTS}, found {tuple(entry.costs)}")
    ranked = [entry for entry in entries if entry.eligible]
    by_cost = {cost: _ranks([(e.costs[cost], e.order.get(cost, 0)) for e in ranked]) for cost in COSTS}
    sums = lambda costs: [sum(ranks) for ranks in zip(*(by_cost[cost] for cost in costs), strict=True)]
    complexity, overall = sums(("params", "flops")), sums(COSTS)
    columns = (by_cost["time"], _ranks(complexity), _ranks(overall), complexity, overall)
    rows = {entry.name: Ranks(*row) for entry, row in zip(ranked, zip(*columns, strict=True), strict=True)}
    return dict(sorted(rows.items(), key=lambda item: item[1].main))


def _ranks(keys: Sequence[Any]) -> list[int]:
    return [1 + sum(other < key for other in keys) for key in keys]


@functools.cache
def _asset() -> dict[str, Any]:
    return read_json(PATH)


def _records(rows: str, columns: str) -> list[dict[str, Any]]:
    return [dict(zip(_asset()[columns], row, strict=True)) for row in _asset()[rows]]


def printed_entries() -> list[Entry]:
    """The 35 ranked teams; their figures are rounded, so that printed ranks decide between equal ones."""
    return [_entry(record["team"], record) for record in _records("rows", "columns")]


def printed_baselines() -> list[Entry]:
    """IMDN and RFDN with the organisers' figures, outside of the ranking."""
    return [_entry(record["model"], record) for record in _records("baselines", "baseline_columns")]


def printed_ranks() -> dict[str, Ranks]:
    """Ranks and scores by team as the paper prints them."""
    fields = ("main_rank", "complexity_rank", "overall_rank", "complexity_score", "overall_score")
    return {r["team"]: Ranks(*(r[field] for field in fields)) for r in _records("rows", "columns")}


def excluded() -> list[tuple[str, float, float]]:
    """(team, validation PSNR, test PSNR) of those not ranked for their PSNR."""
    return [tuple(row) for row in _asset()["excluded"]]


def _entry(name: str, record: dict[str, Any]) -> Entry:
    order = {cost: record[f"{cost}_rank"] for cost in COSTS if f"{cost}_rank" in record}
    return Entry(name, record["psnr_val"], record["psnr_test"], {cost: record[cost] for cost in COSTS}, order)
