"""The table of architectures: `expected.json` as the README shows it.

python tests/architectures/table.py --markdown     # for the README, between its markers
python tests/architectures/table.py --update       # run everything and write down what happened, to be reviewed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FILE = Path(__file__).with_name("expected.json")

WORDS = {
    "exact": "same tokens",
    "packs": "yes",
    "evicts": "yes",
    "packs, post": '`rope="post"`',
    "stock": "stays stock",
    "refused": "refused",
}
GROUPS = {
    ("exact", "packs", "packs", "packs", "evicts"): "everything",
}


def expected() -> dict[str, dict[str, list[str]]]:
    """Outcomes by family and attention, in the order of `outcomes.CACHES`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def markdown() -> str:
    """One row for all families with the same outcomes; two where attention makes a difference."""
    rows: dict[tuple, list[str]] = {}
    for family, by_attention in expected().items():
        stock, ours = (tuple(by_attention[name]) for name in ("stock", "hf_kvcache"))
        if stock == ours:
            rows.setdefault((stock, ""), []).append(family)
        else:
            rows.setdefault((stock, " (default attention)"), []).append(family)
            rows.setdefault((ours, ' (`"hf_kvcache"`)'), []).append(family)
    lines = [
        "| model types | lossless | 8 bits | sparse | low rank | evicting |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (outcomes, note), families in sorted(rows.items(), key=lambda row: (-len(row[1]), row[0])):
        cells = [", ".join(families) + note, *(_cell(outcome) for outcome in outcomes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(outcome: str) -> str:
    word, *advice = outcome.split(", ")
    named = ", ".join([word, *(name for name in advice if name != "config")])
    return WORDS[named] + (", `config=`" if "config" in advice else "")


def update() -> None:
    """Write down what happens now."""
    import torch
    from outcomes import ATTENTIONS, CACHES, all_families, outcome

    torch.set_num_threads(1)
    found = {
        family: {attention: [outcome(family, attention, name) for name in CACHES] for attention in ATTENTIONS}
        for family in all_families()
    }
    lines = [f"  {json.dumps(family)}: {json.dumps(by_attention)}" for family, by_attention in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    parser.add_argument("--update", action="store_true", help="run all families and write expected.json")
    arguments = parser.parse_args()
    if arguments.update:
        update()
    if arguments.markdown:
        print(markdown())


if __name__ == "__main__":
    main()
