"""Fronts as a picture: score over bytes, a panel for every setting and length."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hf_kvcache.eval.front import Front, Point
from hf_kvcache.eval.front_report import Report
from hf_kvcache.eval.labels import Label, place_labels
from hf_kvcache.eval.picture import COLOURS, PEER, family_of

SHARES = (0.03, 0.05, 0.0625, 0.125, 0.25, 0.5, 1.0)


def save_picture(report: Report, path: Path, title: str | None = None) -> None:
    """Write a PNG. Names stand beside the front and the best of every level; a bar is the 95 % interval."""
    height = 4.2 * len(report.fronts) + 0.4
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or f"{report.model}, {report.dtype}, {report.device}", fontsize=11, x=0.01, ha="left")
    with matplotlib.rc_context({"font.size": 9}):
        panels = figure.subplots(len(report.fronts), 1, sharex=True, squeeze=False)[:, 0]
        for axes, front in zip(panels, report.fronts, strict=True):
            _draw(axes, front)
        panels[-1].set_xlabel("← better    bytes of the cache, as a share of DynamicCache (logarithmic)")
        # labels go where they overlap nothing, which needs the final size of the axes
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axes, front in zip(panels, report.fronts, strict=True):
            place_labels(axes, [_label(point) for point in front.points])
    figure.savefig(path)


def _draw(axes, front: Front) -> None:
    best = [point for point in front.points if point.dominated is None]
    axes.step([p.bytes_ratio for p in best], [100 * p.score.mean for p in best], where="pre", color="#bbbbbb", lw=1)
    for name in dict.fromkeys(_family(point) for point in front.points):
        own = [point for point in front.points if _family(point) == name]
        x, y = [p.bytes_ratio for p in own], [100 * p.score.mean for p in own]
        ends = [_ends(point) for point in own]
        style = {"fmt": "s" if name == PEER else "o", "markersize": 5, "elinewidth": 0.5, "capsize": 0}
        axes.errorbar(x, y, list(zip(*ends)), color=COLOURS[name], label=name, zorder=3, **style)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.xaxis.set_major_locator(FixedLocator(SHARES))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("score, %    better →")
    tasks = f"mean of {len(front.tasks)} task{'s' * (len(front.tasks) > 1)}"
    axes.set_title(f"question {front.setting}, {front.length:,} tokens, {tasks}", loc="left", fontsize=10)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _ends(point: Point) -> tuple[float, float]:
    """How far the interval reaches below and above the score."""
    if point.score.low is None:
        return 0.0, 0.0
    mean, low, high = point.score.mean, point.score.low, point.score.high
    return 100 * max(mean - low, 0.0), 100 * max(high - mean, 0.0)


def _family(point: Point) -> str:
    return family_of(point.cache.partition(" @ ")[0])


def _label(point: Point) -> Label:
    # points without a name take room, too
    name = point.cache if point.dominated is None or point.behind is None else ""
    return Label(name, point.bytes_ratio, 100 * point.score.mean, COLOURS[_family(point)])
