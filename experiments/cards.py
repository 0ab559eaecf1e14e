"""Result cards: what an experiment found beside what its paper says, as JSON, and as Markdown rendered from it.

python -m experiments.cards experiments/results/NAME.json     renders NAME.md again
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxcomp.io.files import replacing


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      method: what was run.
      setting: under which conditions.
      metric: what was measured, say "perplexity".
      unit: its unit; "" for a pure number.
      value: the estimate.
      low: lower end of its 95 % interval over seeds or a bootstrap; equals `value` for exact counts.
      high: upper end.
      paper: the published figure of the same method and setting, if there is one.
      note: anything a reader must know, say on which model the paper measured.
    """

    method: str
    setting: str
    metric: str
    unit: str
    value: float
    low: float
    high: float
    paper: float | None = None
    note: str = ""

    def __post_init__(self):
        where = f"row {self.method!r}, {self.setting!r}, {self.metric!r}"
        numbers = [self.value, self.low, self.high, *([] if self.paper is None else [self.paper])]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{where}: expected finite numbers, found {number!r}; leave out what was not measured")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{where}: {self.value} lies outside its interval [{self.low}, {self.high}]")
        if not (self.method and self.setting and self.metric):
            raise ValueError(f"{where}: method, setting and metric must not be empty")

    @property
    def gap(self) -> float | None:
        """(value - paper) / paper, None without a published figure."""
        return None if not self.paper else (self.value - self.paper) / self.paper


@dataclasses.dataclass(frozen=True)
class Card:
    """All numbers of an experiment.

    Attributes:
      name: file name of the card.
      paper: title, venue, arXiv number.
      command: rebuilds the card.
      commit: of the code that ran.
      device: what it ran on.
      minutes: how long it took.
      seeds: seeds of all repetitions.
      rows: the numbers.
      departures: where and why we differ, or a claim does not reproduce.
    """

    name: str
    paper: str
    command: str
    commit: str
    device: str
    minutes: float
    seeds: Sequence[int]
    rows: Sequence[Row]
    departures: Sequence[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "departures", tuple(self.departures))
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"card {self.name!r}: a name has lower-case letters, digits and underscores only")
        if not self.rows:
            raise ValueError(f"card {self.name!r}: no rows; run the experiment first")
        keys = [(row.method, row.setting, row.metric) for row in self.rows]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"card {self.name!r}: {repeated[0]} appears twice")

    def to_json(self) -> str:
        """The card as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """The inverse of `to_json`. Raises ValueError if fields are missing, unknown or invalid."""
        body = json.loads(text)
        rows = [_build(Row, row, "row") for row in body.get("rows", ())]
        return _build(cls, body | {"rows": rows}, "card")

    def to_markdown(self) -> str:
        """One table per setting: methods down, metrics across, ours with interval and the paper's figure with the gap."""
        facts = (f"Command: `{self.command}`", f"Commit: {self.commit}", f"Device: {self.device}")
        facts += (f"Minutes: {self.minutes:.1f}", f"Seeds: {', '.join(map(str, self.seeds))}")
        lines = [f"# {self.name}", "", self.paper, "", *(f"- {fact}" for fact in facts), ""]
        lines += ["Cells: ours [95 % interval]; (paper: published figure, gap).", ""]
        for setting in dict.fromkeys(row.setting for row in self.rows):
            lines += _setting_table(setting, [row for row in self.rows if row.setting == setting])
        notes = dict.fromkeys(row.note for row in self.rows if row.note)
        for heading, texts in (("Notes", notes), ("Departures", self.departures)):
            lines += [f"## {heading}", "", *(f"- {text}" for text in texts), ""] if texts else []
        return "\n".join(lines)

    def write(self, folder: str | pathlib.Path) -> None:
        """Writes `NAME.json` and `NAME.md`, each atomically."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", self.to_json()), (".md", self.to_markdown())):
            with replacing(folder / f"{self.name}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")


def current_commit() -> str:
    """Abbreviated commit of the code, with "-dirty" where tracked files differ from it; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    found = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def current_device() -> str:
    """The device that runs, and the machine's cores."""
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that makes a card again: without `--out`, and absolute paths as FOLDER/name."""
    kept = [argument for argument in arguments if not argument.startswith("--out=")]
    return shlex.join(["python", "-m", module, *(re.sub(r"(^|=)/(?:.*/)?([^/]+)/?$", r"\1FOLDER/\2", a) for a in kept)])


def _build(cls: type, body: Any, what: str) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)}
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if not isinstance(body, dict) or not required <= body.keys() <= fields:
        found = sorted(body) if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"{what}: expected the fields {sorted(fields)}, found {found}")
    return cls(**body)


def _setting_table(setting: str, rows: Sequence[Row]) -> list[str]:
    metrics = list(dict.fromkeys((row.metric, row.unit) for row in rows))
    cells = {(row.method, row.metric): _cell(row) for row in rows}
    names = [_escape(metric + (f" ({unit})" if unit else "")) for metric, unit in metrics]
    lines = [f"## {setting}", "", f"| method | {' | '.join(names)} |", f"|---|{'---:|' * len(metrics)}"]
    for method in dict.fromkeys(row.method for row in rows):
        line = " | ".join(cells.get((method, metric), "") for metric, _ in metrics)
        lines.append(f"| {_escape(method)} | {line} |")
    return [*lines, ""]


def _cell(row: Row) -> str:
    text = _number(row.value)
    if row.low != row.high:
        text += f" [{_number(row.low)}, {_number(row.high)}]"
    if row.paper is not None:
        text += f" (paper: {_number(row.paper)}, {row.gap:+.1%})" if row.paper else " (paper: 0)"
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e4 else f"{value:.4g}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(paths: Sequence[str]) -> None:
    """Renders the Markdown of every card again."""
    for path in map(pathlib.Path, paths):
        Card.from_json(path.read_text(encoding="utf-8")).write(path.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
