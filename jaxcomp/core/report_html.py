"""A `Report` as one HTML page: tiles, plots as inline SVG, tables. No script, no style sheet or font from elsewhere."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxcomp.core.report import COLUMNS, LeafChange, Report, human_bytes, row_text

_BEFORE, _AFTER, _INK, _FAINT = "#b8c0cc", "#2563b8", "#1d2733", "#5b6776"
_SERIES = ("#2563b8", "#c2571a", "#1a8a6b", "#8a4fb0", "#b3261e", "#7a6a00", "#5b6776")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": "#c9d0d9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.grid": True,
    "grid.color": "#e8ebef",
    "axes.axisbelow": True,
}
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;background:#f6f7f9;margin:0}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:16px;margin:0 0 10px}
.card{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:16px 18px;margin:14px 0;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:18px 0}
.tile{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:18px;font-weight:600;white-space:nowrap}.tile span{color:#5b6776;font-size:13px}
.plots{columns:460px;column-gap:14px}
.plots .card{margin:0 0 14px;break-inside:avoid}.card svg{max-width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid #eef0f3;vertical-align:top}
th{color:#5b6776;font-weight:500}td.n,th.n{text-align:right}.scroll{max-height:480px;overflow:auto}
table.facts td:first-child{width:240px;color:#5b6776}
pre{white-space:pre-wrap;margin:0}
"""


def page(report: Report, title: str) -> str:
    """The whole page."""
    plots = f"<div class='plots'>{''.join(_card(name, svg) for name, svg in _plots(report))}</div>"
    plots += _card("Bytes before and after", _bytes_svg(report.leaves)) if report.leaves else ""
    sections = "".join(_card(_heading(name), _content(value)) for name, value in report.sections.items())
    body = f"<h1>{html.escape(title)}</h1>{_tiles(report)}{plots}{sections}" + _card(
        "Changed leaves", f"<div class='scroll'>{_leaf_table(report)}</div>"
    )
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_CSS}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body><main>{body}</main></body></html>\n"


def _card(heading: str, content: str) -> str:
    return f"<section class='card'><h2>{html.escape(heading)}</h2>{content}</section>"


def _heading(name: str) -> str:
    return _label(name).capitalize()


def _label(name: Any) -> str:
    return str(name).replace("_", " ")


def _tiles(report: Report) -> str:
    tiles = [
        (f"{report.ratio:.2f}x", "smaller, whole model"),
        (f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}", "bytes in memory"),
        (f"{report.bits_per_weight:.2f}", "bits per compressed weight"),
    ]
    if report.seconds is not None:
        tiles.append((f"{report.seconds:.1f} s", "to compress"))
    for name, value in report.sections.items():
        if _is_bars(value):
            tiles.append((f"{value[0]['value']:.2f} → {value[-1]['value']:.2f}", _heading(name).lower()))
    cells = "".join(f"<div class='tile'><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>" for b, s in tiles)
    return f"<div class='tiles'>{cells}</div>"


def _leaf_table(report: Report) -> str:
    names = (*COLUMNS[:3], "bits per weight", *COLUMNS[4:6], "relative error", "SQNR (dB)")
    return _table(names, [row_text(leaf) for leaf in report.leaves], numeric=range(3, 8))


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    def line(cells, tag):
        mark = lambda i: " class='n'" if i in numeric else ""
        return "<tr>" + "".join(f"<{tag}{mark(i)}>{html.escape(c)}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    head = f"<thead>{line(names, 'th')}</thead>" if names else ""
    return f"<table{'' if names else ' class=facts'}>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _content(value: Any) -> str:
    """A list of objects as a table, an object as names and values, all else as text."""
    if isinstance(value, Mapping):
        return _table((), [(_label(key), _text(item)) for key, item in value.items()])
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        names = list(dict.fromkeys(key for item in value for key in item))
        numeric = [i for i, n in enumerate(names) if all(isinstance(item.get(n), int | float) for item in value)]
        return _table(list(map(_label, names)), [[_text(item.get(name)) for name in names] for item in value], numeric)
    return f"<pre>{html.escape(_text(value))}</pre>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return "-" if value is None else str(value)


def _is_bars(value: Any) -> bool:
    keys = {"name", "value", "low", "high"}
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and keys <= v.keys() for v in value)


def _plots(report: Report) -> list[tuple[str, str]]:
    """(heading, SVG) of the plots of half the page's width."""
    plots = [(_heading(name), _bars_svg(value)) for name, value in report.sections.items() if _is_bars(value)]
    grid = _grid(report.leaves)
    if grid:
        plots.append(("SQNR by block (higher is better)", _sqnr_svg(grid)))
        plots.append(("Relative error by block and matrix", _heat_svg(grid)))
    return plots


Grid = dict[str, dict[int, LeafChange]]


def _grid(leaves: Sequence[LeafChange]) -> Grid:
    """{matrix: {block: change}} of the changed leaves whose path holds a block number and whose error is known."""
    grid: Grid = {}
    for leaf in leaves:
        number = re.search(r"\d+", leaf.path)
        if number and leaf.sqnr_db is not None:
            matrix = re.sub(r"/(kernel|embedding)$", "", leaf.path[number.end() :].lstrip("/")) or leaf.path
            grid.setdefault(matrix, {})[int(number[0])] = leaf
    return grid


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(draw, width: float, height: float) -> str:
    """Runs `draw(axes)` under the house style and returns the SVG element."""
    salt = {"svg.hashsalt": draw.__qualname__}  # equal reports give equal files
    with matplotlib.rc_context(_STYLE | salt):
        figure, axes = _figure(width, height)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _bars_svg(items: Sequence[Mapping[str, Any]]) -> str:
    def bars(axes):
        values = np.array([item["value"] for item in items], float)
        low, high = (np.array([item[key] for item in items], float) for key in ("low", "high"))
        place = np.arange(len(items))
        spread = np.maximum([values - low, high - values], 0)
        colours = [_BEFORE, *[_AFTER] * (len(items) - 1)]
        axes.barh(place, values, 0.6, color=colours, xerr=spread, error_kw={"ecolor": _INK, "capsize": 3, "lw": 1})
        axes.set_yticks(place, [_short(str(item["name"])) for item in items])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, high.max() * 1.18)
        for y, value, right in zip(place, values, high, strict=True):
            axes.text(right + high.max() * 0.015, y, f"{value:.2f}", va="center")

    return _svg(bars, 5.2, 0.9 + 0.5 * len(items))


def _bytes_svg(leaves: Sequence[LeafChange], most: int = 60) -> str:
    """Bytes per leaf; per block where there are more leaves than fit."""
    sizes: dict[str, np.ndarray] = {}
    for leaf in leaves:
        name = leaf.path.removesuffix("/kernel") if len(leaves) <= most else leaf.path.split("/")[0]
        sizes[name] = sizes.get(name, 0) + np.array([leaf.bytes_before, leaf.bytes_after]) / 1024

    def byte_bars(axes):
        place, values = np.arange(len(sizes)), np.array(list(sizes.values()))
        axes.bar(place - 0.2, values[:, 0], 0.4, color=_BEFORE, label="before")
        axes.bar(place + 0.2, values[:, 1], 0.4, color=_AFTER, label="after")
        axes.set_xticks(place, list(map(_short, sizes)), fontsize=8, rotation=90)
        axes.set_xlim(-0.7, len(sizes) - 0.3)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("KiB")
        axes.figure.legend(frameon=False, loc="outside upper right", ncols=2)

    return _svg(byte_bars, 11, 3.6)


def _sqnr_svg(grid: Grid) -> str:
    def sqnr_lines(axes):
        for i, (matrix, blocks) in enumerate(grid.items()):
            x = sorted(blocks)
            style = {"color": _SERIES[i % len(_SERIES)], "ls": "-" if i < len(_SERIES) else "--"}
            axes.plot(x, [blocks[b].sqnr_db for b in x], marker="o", ms=4, lw=1.5, label=_short(matrix), **style)
        axes.set_xlabel("block")
        axes.set_ylabel("SQNR (dB)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(sqnr_lines, 5.2, 3.2)


def _heat_svg(grid: Grid) -> str:
    matrices, blocks = list(grid), sorted({b for row in grid.values() for b in row})
    value = lambda m, b: grid[m][b].relative_error if b in grid[m] else np.nan
    errors = np.array([[value(m, b) for m in matrices] for b in blocks])

    def heat_map(axes):
        cells = axes.pcolormesh(errors, cmap="Blues", edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        bar = axes.figure.colorbar(cells, ax=axes, label="relative error")
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(False)
        axes.set_xticks(np.arange(len(matrices)) + 0.5, list(map(_short, matrices)), rotation=35, ha="right")
        shown = slice(None, None, 1 + len(blocks) // 17)
        axes.set_yticks(np.arange(len(blocks))[shown] + 0.5, blocks[shown])
        axes.set_ylabel("block")
        axes.grid(visible=False)
        if errors.size <= 120:
            for (y, x), error in np.ndenumerate(errors):
                colour = "white" if cells.norm(error) > 0.6 else _INK
                axes.text(x + 0.5, y + 0.5, f"{error:.3f}", ha="center", va="center", fontsize=8, color=colour)

    return _svg(heat_map, 5.2, min(6.0, 1.6 + 0.3 * len(blocks)))
