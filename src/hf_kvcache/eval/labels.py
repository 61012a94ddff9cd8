"""Labels beside the points of a scatter plot, placed where they overlap nothing."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.transforms import Bbox

FONT_SIZE = 8

# directions around a point, and distances in font sizes, nearest first
DIRECTIONS = ((1, 0), (-1, 0), (0.7, 0.8), (-0.7, 0.8), (0.7, -0.8), (-0.7, -0.8), (0, 1.2), (0, -1.2))
DISTANCES = (0.8, 1.7, 2.7, 3.9, 5.2, 6.6)


@dataclass(frozen=True)
class Label:
    """A text for the point `(x, y)` in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def place_labels(axes, labels: list[Label]) -> None:
    """Write every label at its first free place, else at the least crowded one; far ones get a line to their point.

    The figure must have been drawn once, so that sizes are final.
    """
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    em = FONT_SIZE * axes.figure.dpi / 72
    centres = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [Bbox.from_bounds(x - em / 2, y - em / 2, em, em) for x, y in centres]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent(renderer))
    for label, centre in zip(labels, centres, strict=True):
        size = _size(axes, label.text, renderer)
        offsets = [(dx * far, dy * far) for far in DISTANCES for dx, dy in DIRECTIONS]
        boxes = [_box(centre, offset, size, em) for offset in offsets]
        cost = [sum(box.overlaps(other) for other in taken) + 9 * (not _holds(inside, box)) for box in boxes]
        best = cost.index(min(cost))
        dx, dy = offsets[best]
        axes.annotate(
            label.text,
            (label.x, label.y),
            offsets[best],
            textcoords="offset fontsize",
            fontsize=FONT_SIZE,
            color=label.colour,
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="bottom" if dy > 0 else "top" if dy < 0 else "center",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            if abs(dx) + abs(dy) > 1.5
            else None,
        )
        taken.append(boxes[best])


def _size(axes, text: str, renderer) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    trial = axes.text(0, 0, text, fontsize=FONT_SIZE)
    box = trial.get_window_extent(renderer)
    trial.remove()
    return box.width, box.height


def _box(centre, offset, size, em: float) -> Bbox:
    """Where a text of `size` lands at `offset` (font sizes) from `centre` (pixels)."""
    (x, y), (dx, dy), (width, height) = centre, offset, size
    left = x + dx * em - (0 if dx > 0 else width if dx < 0 else width / 2)
    low = y + dy * em - (0 if dy > 0 else height if dy < 0 else height / 2)
    return Bbox.from_bounds(left, low, width, height)


def _holds(outer: Bbox, box: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1
