"""Loss and KL by position as tables: of all positions, and of bins, side by side."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.positions import Position

COLUMNS = ("cache", "bytes", "perplexity", "95 %", "loss to dense", "95 %", "KL", "95 %", "n")
# what stands side by side: its name, where it is found, and its form
BESIDE = (("KL", "kl", ".3g"), ("Loss to dense", "loss", "+.4f"))
CAPTION = (
    "Texts are read and compressed, and what follows is fed through the compressed cache. bytes: as a share of "
    "DynamicCache's, once both had compressed. perplexity: per token of what follows. loss to dense: paired difference "
    "to DynamicCache on the same texts, in nats per token. KL: of DynamicCache's predictions to this cache's, in nats "
    "per token. Positions count from the first token fed behind the compression. Intervals: bootstrap over texts. "
    "n: texts; failed ones behind a plus."
)


def as_markdown(rows: list[Position], title: str) -> str:
    """All tables, with headings."""
    parts = [f"# {title}"]
    for heading, columns, cells in _tables(rows):
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {heading}\n\n{table}")
    return "\n\n".join([*parts, CAPTION]) + "\n"


def as_tables(rows: list[Position]) -> list[Table]:
    """For a terminal."""
    tables = []
    for heading, columns, cells in _tables(rows):
        table = Table(title=heading, title_justify="left", header_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
        for line in cells:
            table.add_row(*line)
        tables.append(table)
    return tables


def _tables(rows: list[Position]):
    """Heading, names of columns and lines of every table."""
    lengths = list(dict.fromkeys(row.length for row in rows))
    whole = max((row.last for row in rows), default=0)
    of_all = [row for row in rows if (row.first, row.last) == (1, whole)]
    for length in lengths:
        found = [row for row in rows if row.length == length]
        yield f"{length:,} tokens read", COLUMNS, [_cells(row) for row in found if row in of_all]
        if any(row not in of_all for row in found):
            parts = [row for row in found if row not in of_all]
            for name, *what in BESIDE:
                heading = f"{name} by position, {length:,} tokens read"
                yield heading, *_beside(parts, lambda row: f"{row.first}–{row.last}", *what)
    if len(lengths) > 1:
        for name, *what in BESIDE:
            yield f"{name} by tokens read", *_beside(of_all, lambda row: f"{row.length:,}", *what)


def _beside(rows: list[Position], column: Callable[[Position], str], name: str, form: str):
    """Names of columns, and a line for every cache that is not the baseline."""
    columns = list(dict.fromkeys(map(column, rows)))
    caches = dict.fromkeys(row.cache for row in rows if getattr(row, name) is not None)
    cells = {(row.cache, column(row)): "{} ({})".format(*_shown(getattr(row, name), form)) for row in rows}
    return ("cache", *columns), [[cache, *(cells.get((cache, name), "–") for name in columns)] for cache in caches]


def _cells(row: Position) -> list[str]:
    bytes_ratio = "–" if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}"
    n = f"{row.n_texts} + {row.n_failed}" if row.n_failed else str(row.n_texts)
    perplexity, loss, kl = _shown(row.perplexity, ".2f"), _shown(row.loss, "+.4f"), _shown(row.kl, ".3g")
    return [row.cache, bytes_ratio, *perplexity, *loss, *kl, n]


def _shown(found: Estimate | None, form: str) -> tuple[str, str]:
    """Mean and interval."""
    if found is None:
        return "–", "–"
    ends = "–" if found.low is None else f"{found.low:{form}} … {found.high:{form}}"
    return f"{found.mean:{form}}", ends
