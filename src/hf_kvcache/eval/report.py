"""A comparison as a table, as lines, and what is to be known about it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from rich.table import Table

from hf_kvcache.bench.environment import environment
from hf_kvcache.eval.compare import Row, Settings

# heading, attribute of a row, factor, form and unit of every column
COLUMNS = (
    ("MiB", "nbytes", 2**-20, ".2f", ""),
    ("of\ndense", "bytes_ratio", 1, ".3f", ""),
    ("TTFT\ns", "prefill_s", 1, ".2f", ""),
    ("tokens\nper s", "tokens_per_s", 1, ".1f", ""),
    ("vs\nDynamic", "speedup", 1, ".2f", "×"),
    ("perple-\nxity", "perplexity", 1, ".2f", ""),
    ("KL", "kl", 1, ".4f", ""),
    ("re-\ntrieval", "retrieval", 100, ".1f", " %"),
)


def as_table(rows: list[Row], settings: Settings, title: str) -> Table:
    """One line per cache, transformers' own first; an error takes the place of what it prevented."""
    table = Table(
        title=title,
        title_justify="left",
        caption=caption(settings),
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("cache", overflow="fold")
    # two lines, so that the numbers fit narrow terminals
    for name, *_ in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        is_last_peer = row.is_peer and i + 1 < len(rows) and not rows[i + 1].is_peer
        table.add_row(row.cache, *_cells(row), end_section=is_last_peer)
        if row.error:
            table.add_row(f"[red]  {_first_line(row.error)}[/red]", end_section=is_last_peer)
    return table


def caption(settings: Settings) -> str:
    """What the columns of a comparison are."""
    return (
        f"Bytes, time to the first token (TTFT) and decoding at {settings.context:,} tokens; perplexity and KL to the "
        f"dense model (nats per token) through the cache after {settings.n_prefix:,}; retrieval over "
        f"{settings.eval_context:,}."
    )


def heading(width: int) -> str:
    """What stands over lines of `as_line`, for names of caches up to `width` characters."""
    return _line("cache", [name.replace("-\n", "").replace("\n", " ") for name, *_ in COLUMNS], width)


def as_line(row: Row, width: int) -> str:
    """One row as plain text, for logs; an error stands in a line of its own."""
    line = _line(row.cache, _cells(row), width)
    return f"{line}\n  {_first_line(row.error)}" if row.error else line


def about(settings: Settings, model, name: str) -> dict:
    """Everything needed to read the rows later: where, with what, on what they were measured."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(model.device.type),
        "settings": asdict(settings),
    }


def _cells(row: Row) -> list[str]:
    values = ((getattr(row, name), *rest) for _, name, *rest in COLUMNS)
    return ["–" if value is None else f"{value * factor:{form}}{unit}" for value, factor, form, unit in values]


def _line(name: str, cells: list[str], width: int) -> str:
    return "  ".join([name.ljust(width), *(cell.rjust(12) for cell in cells)])


def _first_line(error: str) -> str:
    return error.splitlines()[0]
