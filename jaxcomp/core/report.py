"""What a compression cost and gained: one row per changed leaf, totals, and sections for all that was measured beside."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from jaxcomp.core.leaf import is_compressed, leaves_with_paths, materialise
from jaxcomp.core.leaf import nbytes as tree_nbytes

SCHEMA = "jaxcomp-report/1"
COLUMNS = ("leaf", "kind", "shape", "bits", "before", "after", "error", "SQNR")


@dataclasses.dataclass(frozen=True)
class LeafChange:
    """How one leaf changed.

    Attributes:
      path: path of the leaf.
      kind: leaf kind (`quantized`, ...), `array` for a dense leaf of other values, `removed` or `added`.
      shape: logical shape.
      bits_per_weight: stored bits per logical weight, scales and zero points included.
      bytes_before: bytes of all arrays of the leaf before.
      bytes_after: the same after.
      relative_error: ||after - reference||_F / ||reference||_F; None where there is nothing to compare.
      sqnr_db: 10 log10 (||reference||^2 / ||after - reference||^2), decibels; None if exact or not comparable.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    sqnr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Changes leaf by leaf and free sections.

    Attributes:
      leaves: the changed leaves, in tree order.
      untouched_bytes: bytes of the leaves that stayed as they were.
      seconds: time that the compression took, if known.
      sections: `{title: content}`, content JSON-able. A list of objects is shown as a table, an object as names and values; a
        list of objects with `name, value, low, high` is drawn as bars with intervals, too.
    """

    leaves: tuple[LeafChange, ...]
    untouched_bytes: int
    seconds: float | None = None
    sections: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole tree before."""
        return self.untouched_bytes + sum(leaf.bytes_before for leaf in self.leaves)

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole tree after."""
        return self.untouched_bytes + sum(leaf.bytes_after for leaf in self.leaves)

    @property
    def ratio(self) -> float:
        """Bytes before / bytes after, of the whole tree."""
        return self.bytes_before / self.bytes_after if self.bytes_after else math.inf

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the compressed leaves, scales and zero points included; 0 if there is none."""
        weights = sum(math.prod(leaf.shape) for leaf in self._compressed())
        return 8 * sum(leaf.bytes_after for leaf in self._compressed()) / weights if weights else 0.0

    def _compressed(self) -> list[LeafChange]:
        return [leaf for leaf in self.leaves if leaf.kind not in ("array", "added", "removed")]

    def with_sections(self, **sections: Any) -> Report:
        """The report with further sections, in order; underscores of a name are shown as spaces."""
        return dataclasses.replace(self, sections={**self.sections, **sections})

    def totals(self) -> dict[str, Any]:
        """Bytes of the whole tree, ratio, bits per weight, seconds."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "untouched_bytes": self.untouched_bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "changed_leaves": len(self.leaves),
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """One row per changed leaf and the totals, for a rich console of 80 columns or more."""
        table = Table(
            title=f"{self.ratio:.2f}x smaller",
            show_footer=True,
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        after, before = human_bytes(self.bytes_after), human_bytes(self.bytes_before)
        footer = (f"{len(self.leaves)} changed leaves", "", "", f"{self.bits_per_weight:.2f}", before, after, "", "")
        for i, (name, foot) in enumerate(zip(COLUMNS, footer, strict=True)):
            table.add_column(name, foot, justify="left" if i < 3 else "right", overflow="fold", no_wrap=i != 0)
        for leaf in self.leaves:
            path, *cells = row_text(leaf)
            table.add_row(path.removesuffix("/kernel"), *cells)
        table.add_row("untouched", "", "", "", *[human_bytes(self.untouched_bytes)] * 2, "", "")
        return table

    def to_json(self) -> str:
        """The report as JSON, `{"schema", "totals", "leaves", "sections"}`; `from_json` reads it back."""
        body = {
            "schema": SCHEMA,
            "totals": self.totals(),
            "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "sections": dict(self.sections),
        }
        return json.dumps(body, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`. Raises ValueError for another schema."""
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            found = body.get("schema") if isinstance(body, dict) else type(body).__name__
            raise ValueError(f"report: expected schema {SCHEMA!r}, found {found!r}; write it again with this jaxcomp")
        leaves = tuple(LeafChange(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in body["leaves"])
        totals = body["totals"]
        return cls(leaves, totals["untouched_bytes"], totals["seconds"], body["sections"])

    def to_html(self, title: str = "Compression report") -> str:
        """One self-contained HTML page with plots (inline SVG, no script, no network)."""
        from jaxcomp.core.report_html import page  # plots need matplotlib, which is slow to import

        return page(self, title)


def report(before: Any, after: Any, seconds: float | None = None, reference: Any = None) -> Report:
    """Compares two param trees leaf by leaf; at most one leaf is dense at a time.

    Args:
      before: the tree before compression.
      after: the tree after it, with compressed leaves.
      seconds: time that the compression took.
      reference: tree that errors are measured against, `before` by default. Where a method first moves scales between
        layers (SmoothQuant, AWQ), pass the tree after that step: its dense weights are what was rounded.
    """
    old, new = leaves_with_paths(before), leaves_with_paths(after)
    true = old if reference is None else leaves_with_paths(reference)
    changes, untouched = [], 0
    for path in {**old, **new}:
        change = _change(path, old.get(path), new.get(path), true.get(path))
        if change is None:
            untouched += tree_nbytes(new[path])
        else:
            changes.append(change)
    return Report(tuple(changes), untouched, seconds)


def _change(path: str, old: Any, new: Any, true: Any) -> LeafChange | None:
    """The row of one leaf, None if it did not change."""
    if old is new:
        return None
    before, after = tree_nbytes(old), tree_nbytes(new)
    if old is None or new is None:
        present = new if old is None else old
        bits = 8 * after / max(math.prod(present.shape), 1)
        return LeafChange(path, "added" if old is None else "removed", tuple(present.shape), bits, before, after)
    if not (is_compressed(old) or is_compressed(new)) and _equal(old, new):
        return None
    kind = new.kind if is_compressed(new) else "array"
    bits = 8 * after / max(math.prod(new.shape), 1)
    return LeafChange(path, kind, tuple(new.shape), bits, before, after, *_errors(true, new))


def _equal(old: Any, new: Any) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and bool(jnp.array_equal(old, new))


def _errors(true: Any, new: Any) -> tuple[float | None, float | None]:
    """Relative Frobenius error and SQNR, in float32 sums."""
    if true is None or tuple(true.shape) != tuple(new.shape) or not jnp.issubdtype(true.dtype, jnp.floating):
        return None, None
    signal, noise = map(float, _energies(true, new))
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return None, None
    if noise == 0 or signal == 0:
        return (0.0 if noise == 0 else None), None
    return math.sqrt(noise / signal), 10 * math.log10(signal / noise)


@jax.jit
def _energies(true: Any, new: Any) -> tuple[jax.Array, jax.Array]:
    true, new = (materialise(leaf).astype(jnp.float32) for leaf in (true, new))
    return jnp.sum(true**2), jnp.sum((new - true) ** 2)


def human_bytes(count: float) -> str:
    """A byte count with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def row_text(leaf: LeafChange) -> tuple[str, ...]:
    """The cells of one row as text, in the order of `COLUMNS`; SQNR in decibels."""
    error = "-" if leaf.relative_error is None else f"{leaf.relative_error:.4f}"
    sqnr = f"{leaf.sqnr_db:.1f}" if leaf.sqnr_db is not None else "exact" if leaf.relative_error == 0 else "-"
    shape, bits = "x".join(map(str, leaf.shape)), f"{leaf.bits_per_weight:.2f}"
    before, after = human_bytes(leaf.bytes_before), human_bytes(leaf.bytes_after)
    return leaf.path, leaf.kind, shape, bits, before, after, error, sqnr
