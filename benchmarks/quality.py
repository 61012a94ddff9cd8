"""What caches cost in quality on a real language model: the table behind docs/choosing.md.

    python benchmarks/quality.py --minutes 100     # one piece; again and again until it says that all is answered
    python benchmarks/quality.py --quick           # the five best in twenty minutes

In bfloat16, as such models are run, so that byte shares are those that users see. Every piece goes on from the answers
in benchmarks/results/, and adds its own when it ends. Rounds of a few instances of every task come one after the other,
so that all rows are complete to the same depth whenever it stops. Two processes of one thread each, which have tasks,
--out and --result of their own, do more than one of two; `--also RESULT --minutes 0` then takes up what another found.
What adapters make of caches has a file for each: `--adapters FOLDER --caches locret:ratio=0.25 --settings unknown`. So
have several questions about one text: `--questions 4 --settings unknown turns --batch-size 1 --tasks niah_multikey_1`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import monotonic

import cells
import torch
from wide_linear import widen

from hf_kvcache.adapters import attach
from hf_kvcache.commands.common import load_model
from hf_kvcache.commands.numbers import positive
from hf_kvcache.eval.compare import with_baseline
from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.report import about
from hf_kvcache.eval.running import SETTINGS, Plan, Settings, evaluate
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.tasks import tasks_named

RESULTS = Path(__file__).parent / "results"
# those of which the dense model finds something at 2,048 tokens come first
TASKS = (
    "niah_single_2,niah_multikey_1,niah_multivalue,niah_single_1,niah_multiquery,niah_single_3,passkey,"
    "niah_multikey_2,niah_multikey_3,kv_retrieval"
)
QUICK_TASKS = "niah_single_2,niah_multikey_1,niah_multivalue"
CACHES = (
    "quant:bits=4",
    "quant:bits=2",
    "sparse:sparsity=0.7,bits=4",
    "lowrank:rank=0.5,bits=4",
    "snapkv:ratio=0.25",
    "adakv:ratio=0.25",
    "keydiff:ratio=0.25",
    "expected_attention:ratio=0.25",
    "streaming:ratio=0.25",
    "kvzip:ratio=0.25",
    "kvzip:ratio=0.125",
    "snapkv:ratio=0.5+quant:bits=4",
    "keydiff:ratio=0.5+quant:bits=4",
    "kvzip:ratio=0.5+quant:bits=4",
    "kvzip:ratio=0.25+quant:bits=4",
    "quant:bits=8",
    "kvzip:ratio=0.5",
    "kvzip:ratio=0.125+quant:bits=4",
    "kvzip:ratio=0.25+quant:bits=2",
    "quanto:bits=4",
    "h2o:ratio=0.25",
)
LENGTH, INSTANCES, ROUND, BATCH = 2048, 100, 50, 12
# the longest answer that is right takes about fifty tokens: four numbers of seven digits, or a UUID digit by digit
MAX_NEW_TOKENS = 64
IN = ("unknown", "known")


class OutOfTime(Exception):
    """A piece has lasted as long as it may."""


def main() -> None:
    options = _arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options)
    for folder in options.adapters:
        attach(model, folder, Path(folder).name)
    widened = widen(model)
    tasks = tuple(tasks_named(options.tasks or (QUICK_TASKS if options.quick else TASKS)))
    specs = tuple(with_baseline([parse(text) for text in options.caches]))
    settings = Settings(options.questions, max_new_tokens=MAX_NEW_TOKENS)
    known = about(settings, model, options.model) | {
        "adapter": "+".join(Path(folder).name for folder in options.adapters) or None,
        "float32 products": widened,
    }
    lines = Lines(options.out / "eval.jsonl", known)
    asked = f"{options.questions}-questions" if options.questions > 1 else None
    parts = ["quality", options.model, known["adapter"], asked, "quick" if options.quick else None, "cpu"]
    result = options.result or RESULTS / f"{'-'.join(filter(None, parts))}.json"
    pieces = []
    for path in [*filter(Path.exists, [result]), *options.also]:
        pieces += [piece for piece in cells.unpack_into(lines, path) if piece not in pieces]
    most, n_before, begun = options.instances, len(lines), monotonic()
    deadline = begun + 60 * options.minutes

    def advance(stage: str, n_lines: int) -> None:
        if monotonic() > deadline:
            raise OutOfTime
        if stage:
            print(f"{(monotonic() - begun) / 60:6.1f} min  {stage}", flush=True)

    try:
        for n in range(min(ROUND, most), most + ROUND, ROUND):
            plan = Plan(tasks, (options.length,), min(n, most), tuple(options.settings), specs, options.batch_size)
            evaluate(model, tokenizer, plan, settings, lines, advance)
        print("all is answered")
    except (OutOfTime, KeyboardInterrupt):
        print("to be gone on with: the same command")
    if len(lines) > n_before:
        minutes = round((monotonic() - begun) / 60)
        pieces = [*pieces, known | {"minutes": minutes, "n_answers": len(lines) - n_before}]
    result.write_text(json.dumps(cells.pack(lines, pieces), indent=None, separators=(",", ":")) + "\n")
    print(f"{len(lines):,} answers in {result}; `hf-kvcache report {options.out}` says what they say")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of lines (default: %(default)s)")
    parser.add_argument("--result", type=Path, help="file that answers are kept in (default: in benchmarks/results/)")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="JSON", help="results to take answers from")
    parser.add_argument("--minutes", type=float, default=100, help="of one piece (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three tasks, 12 instances of each")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="to attach, each of another kind")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=IN, help="(default: %(default)s)")
    parser.add_argument("--questions", type=positive, default=1, help="about every text")
    parser.add_argument("--tasks", help="names with commas between them")
    parser.add_argument("--caches", nargs="+", default=CACHES, metavar="SPEC")
    parser.add_argument("--length", type=positive, default=LENGTH)
    parser.add_argument("--instances", type=positive)
    parser.add_argument("--batch-size", type=positive, default=BATCH)
    parser.add_argument("--threads", type=positive)
    options = parser.parse_args()
    options.instances = options.instances or (12 if options.quick else INSTANCES)
    for name, value in {"dtype": "bf16", "device": "cpu", "attn": "hf_kvcache", "adapter": None}.items():
        setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
