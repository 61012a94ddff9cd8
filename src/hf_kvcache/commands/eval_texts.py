"""The task `perplexity` of `hf-kvcache eval`: how well texts are gone on with, by position behind the compression."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import read_text
from hf_kvcache.commands.numbers import positive

TASK = "perplexity"
LINES, RESULT, TABLE = FILES = ("texts.jsonl", "texts.json", "texts.md")
N_NEXT = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        f"the task {TASK}", "--lengths are tokens that are read and compressed here, --instances are windows of texts."
    )
    group.add_argument(
        "--texts", nargs="+", metavar="FILE", help="texts to go on with (default: the prose of this package)"
    )
    group.add_argument(
        "--continuation",
        type=positive,
        metavar="N",
        help=f"tokens fed through the compressed cache (default: {N_NEXT})",
    )


def check_arguments(args: argparse.Namespace, reads_texts: bool) -> None:
    """Raise UserError for arguments of this task where it is not asked for."""
    for option in ("texts", "continuation"):
        if getattr(args, option) and not reads_texts:
            raise UserError(f"--{option}: the task {TASK} is not asked for; add it to --tasks")


def prepare(args: argparse.Namespace, plan, model, tokenizer):
    """The texts and what is scored of them.

    Args:
        plan: of the tasks, which has lengths, instances and caches.

    Raises:
        UserError: a file cannot be read, windows are longer than the model reads, or there are too few.
    """
    from hf_kvcache.eval.continuing import TextPlan
    from hf_kvcache.eval.windows import Windows
    from hf_kvcache.models import embedded_prose

    paths = dict.fromkeys(args.texts or [embedded_prose()])
    texts = Windows(tokenizer, tuple(read_text(path, "--texts") for path in paths), args.seed)
    n_next = args.continuation or N_NEXT
    made = TextPlan(plan.lengths, n_next, plan.n_instances, plan.specs, plan.batch_size)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    n_tokens = made.n_tokens(max(plan.lengths))
    if n_tokens - 1 > most:
        raise UserError(f"--lengths: this model reads at most {most:,} tokens, not {n_tokens - 1:,} (--continuation)")
    n_there = len(texts.places(n_tokens))
    if not n_there:
        raise UserError(f"--texts: none has {n_tokens:,} tokens; give longer ones, or shorter --lengths")
    if n_there < made.n_texts:
        if args.instances:
            raise UserError(
                f"--texts: there are {n_there} windows of {n_tokens:,} tokens, not {made.n_texts}; give more texts, "
                f"shorter --lengths or --instances {n_there}"
            )
        print(f"hf-kvcache eval: {TASK}: all {n_there} windows of {n_tokens:,} tokens that there are", file=sys.stderr)
        made = replace(made, n_texts=n_there)
    return texts, made


def go_on(args: argparse.Namespace, out: Path, model, texts, plan, settings, known: dict) -> int:
    """Score all texts; returns how many of our caches failed on one."""
    from hf_kvcache.commands.progress import shown
    from hf_kvcache.eval.continuing import STEP, ContinuedLines, go_on
    from hf_kvcache.eval.lines import OtherRun

    # those that make a difference here
    chosen = {name: known["settings"][name] for name in ("seed", "attention", "replays")}
    known |= {"settings": chosen, "texts": texts.about(), "continuation": plan.n_next, "step": STEP}
    try:
        lines = ContinuedLines(out / LINES, known)
    except OtherRun as error:
        raise UserError(f"--out: {error}") from error
    try:
        with shown(plan.n_lines) as advance:
            go_on(model, texts, plan, settings, lines, advance)
    except KeyboardInterrupt:
        print(f"hf-kvcache eval: interrupted; the same command goes on from {out / LINES}", file=sys.stderr)
        raise
    finally:
        _show(args, out, known, lines, plan.n_next)
    # a peer that does not run here is no failure of ours
    ours = {spec.text for spec in plan.specs if not spec.is_peer}
    return sum(bool(line.error) and line.cache in ours for line in lines)


def _show(args: argparse.Namespace, out: Path, known: dict, lines, n_next: int) -> None:
    """Summaries to the folder and to standard output."""
    from hf_kvcache.commands.progress import publish
    from hf_kvcache.eval.position_tables import CAPTION, as_markdown, as_tables
    from hf_kvcache.eval.positions import by_position

    files, rows = (out / RESULT, out / TABLE), by_position(lines, n_next)
    publish(rows, known, lines, files, as_markdown, lambda rows: (*as_tables(rows), CAPTION), args.json)
