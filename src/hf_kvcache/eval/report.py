"""A comparison as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from rich.table import Table

from hf_kvcache.bench.environment import environment
from hf_kvcache.eval.compare import Row, Settings


def as_table(rows: list[Row], settings: Settings, title: str) -> Table:
    """One line per cache, transformers' own first; an error takes the place of what it prevented."""
    table = Table(
        title=title,
        title_justify="left",
        caption=(
            f"Bytes, time to the first token (TTFT) and decoding at {settings.context:,} tokens; perplexity and KL to "
            f"the dense model (nats per token) through the cache after {settings.n_prefix:,}; retrieval over "
            f"{settings.eval_context:,}."
        ),
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("cache", overflow="fold")
    # two lines, so that the numbers fit narrow terminals
    for name in ("MiB", "of\ndense", "TTFT\ns", "tokens\nper s", "vs\nDynamic", "perple-\nxity", "KL", "re-\ntrieval"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [
            _show(row.nbytes and row.nbytes / 2**20, ".2f"),
            _show(row.bytes_ratio, ".3f"),
            _show(row.prefill_s, ".2f"),
            _show(row.tokens_per_s, ".1f"),
            _show(row.speedup, ".2f", "×"),
            _show(row.perplexity, ".2f"),
            _show(row.kl, ".4f"),
            _show(row.retrieval and 100 * row.retrieval, ".1f", " %"),
        ]
        is_last_peer = row.is_peer and i + 1 < len(rows) and not rows[i + 1].is_peer
        table.add_row(row.cache, *cells, end_section=is_last_peer)
        if row.error:
            table.add_row(f"[red]  {_first_line(row.error)}[/red]", end_section=is_last_peer)
    return table


def as_dict(rows: list[Row], settings: Settings, model, name: str) -> dict:
    """Everything needed to read the numbers later: where, with what, on what."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(model.device.type),
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
    }


def _show(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _first_line(error: str) -> str:
    return error.splitlines()[0]
