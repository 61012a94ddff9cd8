"""Summaries of an evaluation as tables: one for every setting and length, which are never mixed."""

from __future__ import annotations

from rich.table import Table

from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.running import SETTINGS
from hf_kvcache.eval.summary import Summary

COLUMNS = ("task", "cache", "bytes", "score", "95 %", "to dense", "95 %", "answer", "n")
CAPTION = (
    "bytes: of the cache once it had compressed, as a share of DynamicCache's. score: mean of instances, in percent, "
    "with Wilson's interval where an instance is right or wrong, else a bootstrap over instances. to dense: paired "
    "difference to DynamicCache on the same instances, in points, with Bonett and Price's interval or the bootstrap. "
    "Intervals of means of tasks are made of those of the tasks (Zou and Donner). "
    "answer: tokens. n: instances; failed answers behind a plus."
)


def as_markdown(rows: list[Summary], title: str) -> str:
    """All tables, with headings."""
    parts = [f"# {title}"]
    for setting, length, found in _tables(rows):
        lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *map(_cells, found)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {setting}, {length:,} tokens\n\n{setting}: {SETTINGS[setting]}.\n\n{table}")
    return "\n\n".join([*parts, CAPTION]) + "\n"


def as_tables(rows: list[Summary]) -> list[Table]:
    """For a terminal."""
    tables = []
    for setting, length, found in _tables(rows):
        title = f"{setting}, {length:,} tokens: {SETTINGS[setting]}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if i < 2 else "right", overflow="fold", no_wrap=i >= 2)
        for row, following in zip(found, [*found[1:], None]):
            table.add_row(*_cells(row), end_section=following is not None and following.task != row.task)
        tables.append(table)
    return tables


def _tables(rows: list[Summary]):
    for setting, length in dict.fromkeys((row.setting, row.length) for row in rows):
        yield setting, length, [row for row in rows if (row.setting, row.length) == (setting, length)]


def _cells(row: Summary) -> list[str]:
    bytes_ratio = "–" if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}"
    n_answer = "–" if row.n_answer is None else f"{row.n_answer:.1f}"
    n = f"{row.n_instances} + {row.n_failed}" if row.n_failed else str(row.n_instances)
    return [row.task, row.cache, bytes_ratio, *_shown(row.score, ""), *_shown(row.difference, "+"), n_answer, n]


def _shown(found: Estimate | None, sign: str) -> tuple[str, str]:
    """Mean and interval, in percent."""
    if found is None:
        return "–", "–"
    ends = "–" if found.low is None else f"{100 * found.low:{sign}.1f} … {100 * found.high:{sign}.1f}"
    return f"{100 * found.mean:{sign}.1f}", ends
