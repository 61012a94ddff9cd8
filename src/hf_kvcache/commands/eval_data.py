"""Published data sets in `hf-kvcache eval`: where their rows are from, and whether there are enough of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_kvcache.commands import UserError

# what the rows of every data set of a run are
ROWS = "rows.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("published data sets")
    group.add_argument("--data", metavar="DIR", help="their files, in any folder in DIR (default: from the Hub)")
    group.add_argument(
        "--revision", default="main", metavar="REV", help="on the Hub, where a run begins (default: %(default)s)"
    )
    group.add_argument("--shuffle", action="store_true", help="take rows in an order drawn from --seed")


def tasks_named(names: list[str], args: argparse.Namespace, out: Path):
    """Tasks in the order named, and those of them that are published data sets, with their rows read.

    Raises:
        UserError: there is no such task, its rows are not to be had, or DIR has answers about other rows.
    """
    from hf_kvcache.eval import benchmarks
    from hf_kvcache.eval.tasks import tasks_named as generated

    known = _read(out)
    source = benchmarks.Source(Path(args.data) if args.data else None, args.revision, _commits(known))
    tasks, sets = {}, {}
    for name in names:
        try:
            if benchmarks.is_named(name):
                found = benchmarks.named(name, source, args.seed if args.shuffle else None)
                sets |= {one.kind.name: one for one in found}
                tasks |= {one.kind.name: one.task for one in found}
            else:
                tasks |= {task.name: task for task in generated(name)}
        except ValueError as error:
            raise UserError(f"--tasks: {error}") from error
    if args.data and not sets:
        raise UserError("--data: no published data set is asked for; name one, such as --tasks longbench:multi_news")
    for name, one in sets.items():
        try:
            about = one.about()
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        differing = [key for key in ("rows", "order", "sha256") if known.get(name, about).get(key) != about[key]]
        if differing:
            raise UserError(
                f"--out: {str(out)!r} has answers about other rows of {name}, which differ in {', '.join(differing)}; "
                "write to another folder"
            )
    return tuple(tasks.values()), tuple(sets.values())


def check(sets, plan, settings, tokenizer) -> None:
    """Raise UserError where there are too few instances, or prompts too short for their questions."""
    from hf_kvcache.eval.prompts import Prompter

    few = {one.kind.name: one.n_instances(settings.n_questions) for one in sets}
    few = {name: n for name, n in few.items() if n < plan.n_instances}
    if few:
        of = f" of {settings.n_questions} questions about one text" if settings.n_questions > 1 else ""
        do = f"--instances {min(few.values())}" if min(few.values()) else "ask fewer --questions"
        have = ", ".join(f"{name} has {n}" for name, n in few.items())
        raise UserError(f"--instances: {have} instances{of}, not {plan.n_instances}; {do}")
    prompter = Prompter(tokenizer, settings.uses_template)
    for one in sets:
        n = one.least_tokens(prompter.count, plan.n_instances, settings.n_questions) + prompter.n_added()
        if n > min(plan.lengths):
            raise UserError(f"--lengths: {one.kind.name} takes at least {n:,} tokens, not {min(plan.lengths):,}")


def write(sets, out: Path) -> None:
    """Remember which rows a run is about."""
    if sets:
        rows = _read(out) | {one.kind.name: one.about() for one in sets}
        (out / ROWS).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _read(out: Path) -> dict:
    path = out / ROWS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot read {str(path)!r}: {error}; write to another folder") from error


def _commits(known: dict) -> dict[str, str]:
    """Commits of the repositories that a run began with."""
    from_hub = (about["from"].rpartition("@") for about in known.values() if "@" in about["from"])
    return {repository: commit for repository, _, commit in from_hub}
