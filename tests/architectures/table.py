"""The table of architectures: `expected.json` as docs/architectures.md shows it.

python tests/architectures/table.py --markdown     # for docs/architectures.md, between its markers
python tests/architectures/table.py --update       # run everything and write down what happened, to be reviewed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FILE = Path(__file__).with_name("expected.json")
# of transformers, when expected.json was written
RELEASE = "5.24"

WORDS = {
    "exact": "same tokens",
    "packs": "yes",
    "packs, post": '`rope="post"`',
    "evicts": "yes",
    "stock": "as it is",
    "stock, post": "as it is",
    "refused": "refused",
    "refused, post": "refused",
}
CONFIG = "config"


def expected() -> dict[str, dict[str, list[str]]]:
    """Outcomes by family and attention, in the order of `outcomes.CACHES`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def markdown() -> str:
    """One row for all families with the same outcomes; two where attention makes a difference."""
    rows: dict[tuple, list[str]] = {}
    for family, by_attention in expected().items():
        same = by_attention["stock"] == by_attention["hf_kvcache"]
        for attention, outcomes in by_attention.items():
            if not same or attention == "stock":
                rows.setdefault(("" if same else attention, tuple(outcomes)), []).append(family)
    lines = [
        "| `model_type` | lossless | 8 bits | sparse | low rank | evicting |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (attention, outcomes), families in sorted(rows.items(), key=lambda row: (-len(row[1]), row)):
        words = [outcome.split(", ") for outcome in outcomes]
        notes = [{"": "", "stock": "its own attention", "hf_kvcache": '`"hf_kvcache"`'}[attention]]
        notes += ["`config=model.config`"] if any(CONFIG in parts for parts in words) else []
        note = "; ".join(note for note in notes if note)
        names = ", ".join(families) + (f" **({note})**" if note else "")
        cells = [WORDS[", ".join(part for part in parts if part != CONFIG)] for parts in words]
        lines.append(f"| {' | '.join([names, *cells])} |")
    return "\n".join(lines)


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
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--update", action="store_true", help="run all families and write expected.json")
    arguments = parser.parse_args()
    if arguments.update:
        update()
    if arguments.markdown:
        print(markdown())


if __name__ == "__main__":
    main()
