"""What the dense model scores on every task, with the answers in the text and without them.

python benchmarks/answers_removed.py --model smollm2 --out out/answers-removed

Writes a line for every answer as it goes (DIR/with.jsonl, DIR/without.jsonl), goes on where it was stopped, and prints
a Markdown table at the end: means over instances with intervals of 95 %. The instances are the same in both columns,
but that every expected string has been taken out of the text of the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_kvcache.commands.common import add_model_arguments, load_model
from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.report import about
from hf_kvcache.eval.running import Plan, Settings, evaluate
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.summary import summarise
from hf_kvcache.eval.tasks import TASKS, tasks_named
from hf_kvcache.eval.tasks.evidence import task_without_answers

FORMS = {"with": lambda task: task, "without": task_without_answers}


def main() -> None:
    args = arguments()
    model, tokenizer = load_model(args)
    settings, tasks = Settings(seed=args.seed, replays=False), tasks_named(",".join(args.tasks))
    known = about(settings, model, args.model or "the embedded model")
    lines = {form: Lines(Path(args.out) / f"{form}.jsonl", known) for form in FORMS}
    # a batch of all tasks in both forms after the other, so that a run that is stopped has as many of each
    for n_instances in range(args.batch_size, args.instances + args.batch_size, args.batch_size):
        for form, change in FORMS.items():
            n, asked = min(n_instances, args.instances), tuple(map(change, tasks))
            plan = Plan(asked, (args.length,), n, ("known",), (parse("dynamic"),), args.batch_size)
            evaluate(model, tokenizer, plan, settings, lines[form])
    print(table({form: {row.task: row for row in summarise(lines[form], settings.n_questions)} for form in FORMS}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="NAME", help="tasks or groups (default: all)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=20, metavar="N", help="of a task (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=5, metavar="N", help="texts at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the texts (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the lines go")
    return parser.parse_args()


def table(found: dict[str, dict]) -> str:
    """Scores in percent, a line per task."""
    lines = ["| task | with the answers | n | without | n |", "|---|---|---|---|---|"]
    for task in (name for name in TASKS if name in found["with"]):
        rows = [found[form].get(task) for form in FORMS]
        cells = [cell for row in rows for cell in (_cell(row and row.score), str(row.n_instances if row else 0))]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(score: Estimate | None) -> str:
    if score is None:
        return "–"
    ends = "" if score.low is None else f" ({100 * score.low:.0f} to {100 * score.high:.0f})"
    return f"{100 * score.mean:.1f}{ends}"


if __name__ == "__main__":
    main()
