"""Write the tables of docs/benchmarks.md, and of other pages, from the JSON in benchmarks/results/.

python benchmarks/tables.py     # fills what stands between <!-- NAME --> and <!-- /NAME -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import choosing
import evaluation_tables
import trained_table
import turns_table

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"

VERSIONS = ("torch", "transformers")
# what is attended to in the suite of that name
PROMPTS = {
    "whole": "{tokens:,} tokens",
    "padded": "{tokens:,} tokens, left-padded",
    "chunk": "{tokens:,} tokens after {before:,}",
}
# policies that act on the control run at the bytes of a retrofit, as columns
BESIDE = ("H2O", "TOVA", "sliding window", "window, merging", "KeyDiff, merging")


def load(name: str) -> dict:
    """One file of results, by its name without "-cpu.json"."""
    return json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def pivot(title: str, rows: list[dict], line: str, column: str, cell: Callable[[dict], str], form=str) -> str:
    """A line per value of `line`, a column per value of `column`, both in the order of the file; "–" where none is."""
    found = {(row[line], row[column]): cell(row) for row in rows}
    columns = list(dict.fromkeys(row[column] for row in rows))
    lines = list(dict.fromkeys(row[line] for row in rows))
    cells = [[form_name(name), *(found.get((name, value), "–") for value in columns)] for name in lines]
    return table([title, *(form(value) for value in columns)], cells)


def form_name(name: str) -> str:
    """Folders of retrofits by what is in them: "gqa-2x-dmc-2x" is "GQA 2x, DMC 2x"; other names as they are."""
    parts = re.findall(r"(dmc|dms|gqa)-(\d+x)", name)
    return ", ".join(f"{method.upper()} {ratio}" for method, ratio in parts) or name


def small(value: float) -> str:
    """A KL divergence, two digits."""
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def compare() -> str:
    head = ["cache", "bytes, of dense", "decode, × `DynamicCache`", "perplexity", "KL, nats", "retrieval"]
    lines = [
        [
            f"`{row['cache']}`",
            f"{row['bytes_ratio']:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{percent(row['retrieval'])} %",
        ]
        for row in load("compare-embedded")["rows"]
    ]
    return table(head, lines)


def attention() -> str:
    rows = load("attention")["rows"]
    return pivot("cache", rows, "cache", "shape", lambda row: f"{row['x stock']:.1f} ({row['MiB']:.0f} MiB)")


def scaling() -> str:
    rows = load("scaling")["rows"]
    return pivot("cache", rows, "cache", "tokens", lambda row: f"{row['x stock']:.1f}", "{:,} tokens".format)


def prompts() -> str:
    rows = load("prompts")["rows"]
    rows = [row | {"prompt": f"{row['shape']}, {PROMPTS[row['call']].format(**row)}"} for row in rows]
    return pivot("prompt", rows, "prompt", "dtype", lambda row: f"{row['x sdpa']:.1f}")


def generate() -> str:
    prefill = {row["cache"]: row["x DynamicCache"] for row in load("prefill")["rows"] if row["tokens"] == 8192}
    rows = load("generate")["rows"]
    lines = [[row["cache"], f"{row['x DynamicCache']:.2f}", f"{prefill[row['cache']]:.2f}"] for row in rows]
    return table(["cache", "decode, × `DynamicCache`", "time to the first token, × `DynamicCache`"], lines)


def equal_memory() -> str:
    rows = load("equal-memory")["rows"]
    lines = [[row["cache"], str(row["batch"]), f"{row['x DynamicCache']:.1f}"] for row in rows]
    return table(["cache", "sequences that fit", "tokens per second, × `DynamicCache`"], lines)


def memory() -> str:
    rows = load("memory")["rows"]
    lines = [[row["cache"], f"{row['process MiB']:.0f}", f"{row['x dense']:.2f}"] for row in rows]
    return table(["cache", "MiB", "of `DynamicCache`"], lines)


def long_prompt() -> str:
    rows = load("long-prompt")["rows"]
    return pivot("cache", rows, "cache", "tokens", lambda row: f"{row['peak MiB']:.0f}", "{:,} tokens".format)


def eviction() -> str:
    # what keeps everything needs no column of its own
    rows = [row | {"kept": 0.25} if row["kept"] == 1 else row for row in load("eviction-embedded")["rows"]]
    return pivot(
        "policy",
        rows,
        "policy",
        "kept",
        lambda row: f"{percent(row['retrieval'])}, {percent(row['passkey'])}; {row['KL']:.3f}",
        lambda kept: f"1/{1 / kept:.0f} kept",
    )


def kvpress() -> str:
    rows = [row for row in load("kvpress-embedded")["rows"] if row["kept"] in (0.125, 1)]
    return pivot(
        "policy",
        rows,
        "policy",
        "library",
        lambda row: f"{percent(row['retrieval'])} %, {row['bytes']:.2f}, {row['step ms']:.1f}",
    )


def heads() -> str:
    rows = []
    for row in load("heads")["rows"]:
        name, _, split = row["cache"].rpartition(", ")
        if row["cache"] != "KVCache, dense":
            rows.append(row | {"name": name, "heads": split})
    return pivot("rows", rows, "name", "heads", lambda row: f"{row['ms']:.2f}")


def pruning(name: str) -> str:
    rows = [row for row in load(f"pruning-{name}")["rows"] if row["side"] != "K+V"]
    rows = [row | {"column": f"{row['side']} {row['setting']}"} for row in rows]
    columns = sorted({row["column"] for row in rows})
    rows.sort(key=lambda row: columns.index(row["column"]))
    return pivot("what is dropped", rows, "rule", "column", lambda row: small(row["KL"]))


def pruning_bytes() -> str:
    wanted = ("magnitude per token", "magnitude per token >> quantised", "quantised")
    rows = [r for r in load("pruning-embedded")["rows"] if r["side"] == "K+V" and r["rule"] in wanted]
    rows.sort(key=lambda row: -(row["bytes K"] + row["bytes V"]))
    lines = [
        [
            f"{'quantised' if row['rule'] == 'quantised' else 'pruned'} {row['setting']}",
            f"{(row['bytes K'] + row['bytes V']) / 2:.2f}",
            f"{row['change %']:+.2f} %",
            small(row["KL"]),
        ]
        for row in rows
    ]
    return table(["keys and values", "bytes, of dense", "perplexity", "KL, nats"], lines)


def projection() -> str:
    rows = [
        row | {"cache": f"{row['group']}: {row['cache']}" if row["group"] != "calibration" else row["cache"]}
        for row in load("projection-embedded")["rows"]
        if row["group"] in ("calibration", "fitted to the prompt", "eviction")
    ]
    rows.sort(key=lambda row: -float(row["setting"].rstrip("%")))
    # ways that were measured at every size first, those of half the size alone after them
    often = {row["cache"] for row in rows if row["setting"] == "25%"}
    rows.sort(key=lambda row: row["cache"] not in often)
    return pivot("kept", rows, "cache", "setting", lambda row: small(row["KL"]))


def projection_bits() -> str:
    rows = load("projection-embedded")["rows"]
    kl = {(row["cache"], row["setting"]): row["KL"] for row in rows}
    lines = []
    for row in rows:
        if row["group"] == "quantised latents" and row["cache"] == "latents rotated":
            plain = small(kl["latents not rotated", row["setting"]])
            lines.append([f"latents, {row['setting']}", share(row), small(row["KL"]), plain])
        elif row["group"] == "quantised rows":
            lines.append([f"`QuantCache`, {row['setting']}", share(row), small(row["KL"]), "–"])
    return table(["rows", "bytes, of dense", "KL, nats", "latents not rotated"], lines)


def share(row: dict) -> str:
    return f"{row['packed bytes, of dense']:.2f}"


def retrofit() -> str:
    rows = {row["model and cache"]: row for row in load("retrofit-embedded")["rows"]}

    def cell(name: str) -> str:
        return f"{rows[name]['perplexity']:.1f} / {100 * rows[name]['retrieval']:.0f} %"

    lines = []
    for name in rows:
        if " at the bytes of " not in name:
            beside = [f"{policy} at the bytes of {name}" for policy in BESIDE]
            others = [cell(other) if other in rows else "–" for other in beside]
            lines.append([form_name(name), f"{rows[name]['bytes']:.2f}", cell(name), *others])
    return table(["model", "bytes, of dense", "itself", *BESIDE], lines)


def realised() -> str:
    rows = load("realised")["rows"]
    return pivot(
        "model",
        rows,
        "model",
        "tokens",
        lambda row: f"{row['realised']:.1f} ({row['tokens per row']:.1f})",
        "{:,} tokens".format,
    )


def recall() -> str:
    lines = []
    for row in load("recall")["rows"]:
        asked = f", asked for {row['asked']}" if row["asked"] else ""
        lines.append([row["rows"] + asked, f"{row['tokens per row']:.1f}", f"{percent(row['accuracy'])} %"])
    return table(["model or cache", "tokens per row", "answers"], lines)


def serving() -> str:
    found: dict[str, dict[str, dict]] = {}
    for row in load("serving")["rows"]:
        found.setdefault(row["cache"], {})[row["what is equal"]] = row
    dense = found["DynamicCache + sdpa"]
    lines = []
    for name, row in found.items():
        time = row["batch"]["ms"] / dense["batch"]["ms"]
        speed = row["memory"]["tokens/s"] / dense["memory"]["tokens/s"]
        lines.append([name, f"{time:.2f}", str(row["memory"]["batch"]), f"{speed:.1f}"])
    return table(["cache", "same batch: time of dense", "same memory: batch", "tokens/s, of dense"], lines)


def retrofit_prefill() -> str:
    rows = [dict(zip(("name", "ratio"), row["cache"].split()), **row) for row in load("retrofit-prefill")["rows"][1:]]
    return pivot("time of dense", rows, "name", "ratio", lambda row: f"{row['x dense']:.2f}")


# what stands in a block: the table, and the file and command that it comes from
def host_time() -> str:
    """Microseconds of Python per layer and step beyond those of `DynamicCache`."""
    trees = load("host-time")["us"]
    lines = [[name, *(f"{trees[tree][name]:.0f}" for tree in ("base", "here"))] for name in trees["here"]]
    return table(["cache", "before the walk was one, µs", "now, µs"], lines)


BLOCKS: dict[str, tuple[Callable[[], str], str, str]] = {
    "compare": (compare, "compare-embedded", "hf-kvcache compare --all"),
    "attention": (attention, "attention", "python benchmarks/run.py attention"),
    "prompts": (prompts, "prompts", "python benchmarks/run.py prompts"),
    "scaling": (scaling, "scaling", "python benchmarks/run.py scaling"),
    "host-time": (host_time, "host-time", "python benchmarks/host_time.py --base TREE"),
    "generate": (generate, "generate", "python benchmarks/run.py generate prefill"),
    "equal-memory": (equal_memory, "equal-memory", "python benchmarks/run.py equal-memory"),
    "memory": (memory, "memory", "python benchmarks/run.py memory"),
    "long-prompt": (long_prompt, "long-prompt", "python benchmarks/run.py long-prompt"),
    "eviction": (eviction, "eviction-embedded", "python benchmarks/run.py eviction"),
    "kvpress": (kvpress, "kvpress-embedded", "python benchmarks/run.py kvpress --kvpress-python …"),
    "heads": (heads, "heads", "python benchmarks/run.py heads"),
    "pruning": (lambda: pruning("embedded"), "pruning-embedded", "python benchmarks/run.py pruning"),
    "pruning-babyllama": (
        lambda: pruning("BabyLlama-105char"),
        "pruning-BabyLlama-105char",
        "python benchmarks/run.py pruning --model … --text …",
    ),
    "pruning-stories": (
        lambda: pruning("stories260K"),
        "pruning-stories260K",
        "python benchmarks/run.py pruning --model … --text …",
    ),
    "pruning-bytes": (pruning_bytes, "pruning-embedded", "python benchmarks/run.py pruning"),
    "projection": (projection, "projection-embedded", "python benchmarks/run.py projection"),
    "projection-bits": (projection_bits, "projection-embedded", "python benchmarks/run.py projection"),
    "retrofit": (retrofit, "retrofit-embedded", "python benchmarks/run.py retrofit --retrofits FOLDER"),
    "realised": (realised, "realised", "python benchmarks/run.py realised --retrofits FOLDER"),
    "recall": (recall, "recall", "python benchmarks/run.py recall"),
    "serving": (serving, "serving", "python benchmarks/run.py serving"),
    "retrofit-prefill": (retrofit_prefill, "retrofit-prefill", "python benchmarks/run.py retrofit-prefill --rounds 3"),
}


def block(name: str) -> str:
    """A table, and under it the command, machine, versions and commit."""
    make, file, command = BLOCKS[name]
    found = load(file)
    where = [f"`{command}`", found["device"], f"threads: {found['threads']}"]
    where += [f"{library} {version}" for library, version in found.get("versions", {}).items() if library in VERSIONS]
    where += [f"commit {found['commit']}"] if "commit" in found else [f"{found['date']}; {found['note']}"]
    return f"{make()}\n\n{', '.join(where)}"


def filled(text: str, make: dict[str, Callable[[], str]] | None = None) -> str:
    """A page with every block as it should be.

    Args:
        text: of the page.
        make: what makes each block; None for all of docs/benchmarks.md, which has no others.

    Raises:
        ValueError: a block is missing, or unknown where there are to be no others.
    """
    names = re.findall(r"<!-- ([\w-]+) -->", text)
    if make is None:
        make = {name: partial(block, name) for name in BLOCKS}
        if sorted(names) != sorted(make):
            raise ValueError(f"blocks are {sorted(names)}, tables {sorted(make)}")
    if missing := sorted(make.keys() - set(names)):
        raise ValueError(f"blocks are missing: {', '.join(missing)}")
    for name in make:
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, _, rest = text.partition(start)
        text = f"{head}{start}\n{make[name]()}\n{end}{rest.partition(end)[2]}"
    return text


# blocks of other pages, which have markers of other kinds, too
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "choosing.md": choosing.BLOCKS | turns_table.BLOCKS,
    ROOT / "docs" / "evaluation.md": evaluation_tables.BLOCKS | trained_table.BLOCKS,
    ROOT / "README.md": {"chooser": choosing.readme},
}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for page, make in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), make), encoding="utf-8")


if __name__ == "__main__":
    main()
