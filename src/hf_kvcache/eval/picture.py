"""A comparison as a picture: fidelity above, speed below, both against bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hf_kvcache import registry
from hf_kvcache.eval.compare import Row
from hf_kvcache.eval.labels import Label, place_labels
from hf_kvcache.eval.peers import PEERS

PEER = "transformers' own"
OTHER = "another library"
AXES = ("tokens", "channels", "bits")
# one for every kind that there can be: shades of green save channels, warm colours tokens
COLOURS = {
    PEER: "#7a7a7a",
    OTHER: "#c9a3a3",
    "saves nothing": "#111111",
    "saves bits": "#1f6fb4",
    "saves channels": "#7bbf4e",
    "saves channels and bits": "#1b7f4b",
    "saves tokens": "#d1601b",
    "saves tokens and bits": "#7b3fa0",
    "saves tokens and channels": "#b8980f",
    "saves tokens, channels and bits": "#c2185b",
}

# KL below this is rounding; a logarithmic axis needs a floor
LEAST_KL = 1e-6


def save_picture(rows: list[Row], path: Path, title: str) -> None:
    """Write a PNG of all rows that have numbers; nothing where fidelity was not measured."""
    rows = [row for row in rows if row.bytes_ratio is not None]
    if all(row.kl is None for row in rows):
        return
    figure = Figure(figsize=(10, 9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with matplotlib.rc_context({"font.size": 9}):
        upper, lower = figure.subplots(2, 1, sharex=True)
        fidelity = [(row, max(row.kl, LEAST_KL)) for row in rows if row.kl is not None]
        speed = [(row, row.speedup) for row in rows]
        _scatter(upper, fidelity)
        _scatter(lower, speed)
        _dress_fidelity(upper)
        _dress_speed(lower)
        _dress_bytes(lower, [row.bytes_ratio for row in rows])
        # labels go where they overlap nothing, which needs the final size of the axes
        figure.canvas.draw()
        figure.set_layout_engine("none")
        place_labels(upper, [Label(_with_retrieval(row), row.bytes_ratio, y, _colour(row)) for row, y in fidelity])
        place_labels(lower, [Label(row.cache, row.bytes_ratio, y, _colour(row)) for row, y in speed])
    figure.savefig(path)


def family(row: Row) -> str:
    """What the row saves on, from the registry and its bits: the group of its colour."""
    return PEER if row.is_peer else family_of(row.cache)


def family_of(cache: str) -> str:
    """The same for a specification, those of transformers and of other libraries included."""
    if cache.partition(":")[0] in PEERS:
        return PEER
    names = {method.name for method in registry.METHODS}
    saved = set()
    for part in cache.split("+"):
        name, _, knobs = part.strip().partition(":")
        if name not in names:
            return OTHER
        saved.add(registry.method(name).axis)
        if any(knob.strip().startswith("bits=") for knob in knobs.split(",")):
            saved.add("bits")
    *most, last = [axis for axis in AXES if axis in saved] or ["nothing"]
    return f"saves {', '.join(most)} and {last}" if most else f"saves {last}"


def _dress_fidelity(axes) -> None:
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_ylabel("KL to the dense model, nats per token\n← better")
    axes.set_title("fidelity through the compressed cache (in brackets: retrieval)", loc="left", fontsize=10)
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def _dress_speed(axes) -> None:
    axes.axhline(1, color="#aaaaaa", linewidth=0.8, zorder=0)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("decode speed, × DynamicCache\nbetter →")
    axes.set_title("decoding", loc="left", fontsize=10)


def _dress_bytes(axes, ratios: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(ratios) / 1.35, max(*ratios, 1.0) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("← better    bytes of the cache, as a share of DynamicCache (logarithmic)")


def _scatter(axes, points: list[tuple[Row, float]]) -> None:
    """One marker per row, coloured by family."""
    for name in dict.fromkeys(family(row) for row, _ in points):
        own = [(row.bytes_ratio, y) for row, y in points if family(row) == name]
        marker = "s" if name == PEER else "o"
        axes.scatter(*zip(*own, strict=True), s=34, color=COLOURS[name], marker=marker, label=name, zorder=3)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(row: Row) -> str:
    return COLOURS[family(row)]


def _with_retrieval(row: Row) -> str:
    return row.cache if row.retrieval is None else f"{row.cache} ({100 * row.retrieval:.0f} %)"
