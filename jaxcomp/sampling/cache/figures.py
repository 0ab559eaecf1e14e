"""Figures of a calibration (residual profile, plans, quality over computed steps), as PNG files or one HTML page."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure

from jaxcomp.io.files import replacing
from jaxcomp.sampling.cache.ertacache import Profile
from jaxcomp.sampling.cache.pareto import Curve, Point

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;color:#1d2733}img{max-width:100%}"
    "td,th{padding:2px 14px 2px 0;text-align:right;font-variant-numeric:tabular-nums}.chosen{font-weight:700}"
)


def draw_profile(profile: Profile) -> Figure:
    """E over the step that is reused, one line per distance."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    errors = profile.ratio_of_sums
    for j in range(errors.shape[1]):
        shade = 0.25 + 0.75 * j / max(errors.shape[1] - 1, 1)
        axes.plot(errors[:, j], color=(0.1, 0.3, 0.7, shade), label=f"{j + 1} later")
    axes.set(
        xlabel="reused step a",
        ylabel="relative L1 error E[a, b]",
        yscale="log",
        title="Error of reusing step a at step b",
    )
    axes.legend(ncols=2, fontsize=7, frameon=False)
    return figure


def draw_plans(plans: Mapping[str, Bool[np.ndarray, "T"]]) -> Figure:
    """One row per plan, dark where the trunk runs."""
    figure = Figure(figsize=(7, 0.9 + 0.28 * len(plans)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        np.stack([np.asarray(mask, float) for mask in plans.values()]), cmap="Blues", vmin=0, vmax=1.2, aspect="auto"
    )
    axes.set_yticks(range(len(plans)), list(plans))
    axes.set(xlabel="step", title="Computed steps (dark)")
    return figure


def draw_curves(curves: Mapping[str, Curve], chosen: Point | None = None) -> Figure:
    """PSNR over computed steps with 95 % intervals; full runs are left out, they are exact."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        points = [point for point in curve.points if point.computed < curve.steps]
        n, value = [p.computed for p in points], [p.psnr.value for p in points]
        axes.plot(n, value, marker=".", label=name)
        axes.fill_between(n, [p.psnr.low for p in points], [p.psnr.high for p in points], alpha=0.2)
    if chosen is not None:
        axes.axvline(chosen.computed, color="grey", linestyle=":")
    steps = max(curve.steps for curve in curves.values())
    axes.set(xlabel=f"computed steps of {steps}", ylabel="PSNR to the full run (dB)", title="Quality over compute")
    axes.legend(frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG, 144 dpi."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def write_report(
    path: str | pathlib.Path,
    title: str,
    curves: Mapping[str, Curve],
    figures: Sequence[Figure],
    chosen: Point | None = None,
) -> None:
    """Writes one HTML page with the figures and a table of every point of every curve, or a PNG of the last figure.

    Raises:
      ValueError: another suffix than .html or .png.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"{path}: expected a name that ends in .html or .png")
    page = png(figures[-1]) if path.suffix == ".png" else _page(title, curves, figures, chosen).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(page)


def _page(title: str, curves: Mapping[str, Curve], figures: Sequence[Figure], chosen: Point | None) -> str:
    images = "".join(f"<p><img src='data:image/png;base64,{base64.b64encode(png(f)).decode()}'></p>" for f in figures)
    head = "<tr><th>cache<th>computed<th>PSNR (dB)<th>95 %<th>relative error<th>95 %</tr>"
    rows = "".join(
        f"<tr{' class=chosen' if point is chosen else ''}><td>{html.escape(name)}<td>{point.computed} of {curve.steps}"
        f"<td>{point.psnr.value:.2f}<td>{point.psnr.low:.2f} to {point.psnr.high:.2f}"
        f"<td>{point.relative_error.value:.4f}<td>{point.relative_error.low:.4f} to {point.relative_error.high:.4f}</tr>"
        for name, curve in curves.items()
        for point in curve.points
    )
    title = html.escape(title)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{images}<table>{head}{rows}</table></html>\n"
    )
