"""Draw docs/compare.png, bytes against fidelity, and docs/front.png, score over bytes of an evaluation.

python benchmarks/picture.py     # needs matplotlib; from what `hf-kvcache compare` and `report --out` have written
"""

from __future__ import annotations

import json
from pathlib import Path

import choosing
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hf_kvcache.eval.compare import Row
from hf_kvcache.eval.front_picture import save_picture
from hf_kvcache.eval.labels import Label, place_labels
from hf_kvcache.eval.picture import COLOURS, LEAST_KL, PEER, family

FILE = Path(__file__).parent / "results" / "demo-embedded-cpu.json"
PICTURE = Path(__file__).parents[1] / "docs" / "compare.png"
SHARES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: a point per cache, its answers found in brackets."""
    figure = Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(row, max(row.kl, LEAST_KL)) for row in rows]
    for kind in dict.fromkeys(family(row) for row in rows):
        own = [(row.bytes_ratio, kl) for row, kl in points if family(row) == kind]
        marker = "s" if kind == PEER else "o"
        axes.scatter(*zip(*own, strict=True), s=34, color=COLOURS[kind], marker=marker, label=kind, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.15)
    axes.xaxis.set_major_locator(FixedLocator(SHARES))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("← better    bytes of the cache, as a share of DynamicCache (logarithmic)")
    axes.set_ylabel("KL to the dense model,\nnats per token    ← better")
    axes.set_title("fidelity through the compressed cache (in brackets: retrieval)", loc="left", fontsize=10)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    # labels go where they overlap nothing, which needs the final size of the axes
    figure.canvas.draw()
    figure.set_layout_engine("none")
    place_labels(
        axes,
        [
            Label(f"{row.cache} ({100 * row.retrieval:.0f} %)", row.bytes_ratio, kl, COLOURS[family(row)])
            for row, kl in points
        ],
    )
    figure.savefig(path)


def main() -> None:
    save_picture(choosing.evidence(), choosing.PICTURE)
    draw([Row(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]], PICTURE)


if __name__ == "__main__":
    main()
