"""Tasks over long texts, asked of a model behind many caches: scores with intervals, beside the dense cache's.

A task is a name or a group of names (`needles`, `ruler`, `all`), or a published data set (`longbench:multi_news`,
`longbench_v2`, `infinitebench:passkey`, `leval:quality`), whose rows come from --data DIR or from the Hub. A cache is
written as in `hf-kvcache compare`. transformers' DynamicCache is always asked, too: differences are to its answers on
the same instances. `perplexity` is another kind of task: texts are read and compressed, what follows is fed through the
compressed cache, and its loss and KL to the dense cache are told by position.

What a cache knows when it compresses is a setting, and settings are never mixed in one number:
  known    instruction, context and question are read together, then the cache compresses, then the answer comes
  unknown  instruction and context are read and compressed once, each question is asked of a copy of that cache
  turns    instruction and context are read and compressed, then the questions follow each other in that cache

DIR/eval.jsonl has a line for every answer as soon as there is one: the same command goes on where it was stopped, and
more tasks, lengths, instances, settings or caches add to it. DIR/eval.json and DIR/eval.md are written at the end;
`perplexity` has files of its own, DIR/texts.jsonl, DIR/texts.json and DIR/texts.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_kvcache.commands import UserError, eval_data, eval_texts
from hf_kvcache.commands.common import add_model_arguments, check_writable, load_model, parse_specs, retrofitted
from hf_kvcache.commands.numbers import count, positive

LINES, RESULT, TABLE = "eval.jsonl", "eval.json", "eval.md"
SETTINGS = ("known", "unknown", "turns")
# tokens of a prompt, and instances: as it is, and with --quick
LENGTHS, QUICK_LENGTHS = (4096,), (1024,)
INSTANCES, QUICK_INSTANCES = 100, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("what to ask")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="tasks or groups of them (default: needles, with --texts perplexity)",
    )
    group.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        metavar="N",
        help=f"tokens of a prompt with its answer (default: {LENGTHS[0]}; with --quick {QUICK_LENGTHS[0]})",
    )
    group.add_argument(
        "--instances",
        type=positive,
        metavar="N",
        help=f"texts of every task and length (default: {INSTANCES}; with --quick {QUICK_INSTANCES})",
    )
    group.add_argument(
        "--questions", type=positive, default=1, metavar="N", help="questions about every text (default: %(default)s)"
    )
    group.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=["known", "unknown"],
        help="what a cache knows when it compresses (default: known unknown)",
    )
    group.add_argument("--caches", nargs="+", metavar="SPEC", help="caches to ask (default: ten that help to choose)")
    group.add_argument("--seed", type=count, default=0, metavar="N", help="of the texts (default: %(default)s)")
    group.add_argument("--quick", action="store_true", help="few and short texts, to see whether all runs")
    eval_data.add_arguments(parser)
    eval_texts.add_arguments(parser)
    group = parser.add_argument_group("how")
    group.add_argument("--no-chat-template", action="store_true", help="plain text, also where there is a template")
    group.add_argument(
        "--no-replay", action="store_true", help="let every cache read every text, instead of one dense pass for all"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="texts that are read and asked together, at most (default: %(default)s; not with turns)",
    )
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="the most tokens of an answer, where a task allows more"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", required=True, metavar="DIR", help=f"write there: {LINES} as it goes, {RESULT} and {TABLE} at the end"
    )
    group.add_argument("--json", action="store_true", help="print JSON instead of tables, of tasks and of texts each")


def run(args: argparse.Namespace) -> int:
    from hf_kvcache.eval.report import about
    from hf_kvcache.eval.running import Settings

    typed = parse_specs(args.caches) if args.caches else None
    names = args.tasks or [eval_texts.TASK if args.texts else "needles"]
    reads_texts = eval_texts.TASK in names
    out = Path(args.out)
    tasks, sets = eval_data.tasks_named([name for name in names if name != eval_texts.TASK], args, out)
    eval_texts.check_arguments(args, reads_texts)
    if "turns" in args.settings and args.questions < 2:
        raise UserError("--settings turns: turns are of several questions; give --questions 2 or more")
    if "turns" in args.settings and args.batch_size > 1:
        raise UserError(
            "--settings turns: answers differ in length, so texts are asked one by one; leave out --batch-size"
        )
    check_writable(out, "--out", (LINES, RESULT, TABLE, eval_data.ROWS, *eval_texts.FILES))
    model, tokenizer = load_model(args)
    settings = Settings(
        args.questions, args.seed, not args.no_chat_template, args.attn, not args.no_replay, args.max_new_tokens
    )
    plan = _plan(args, tasks, typed, model)
    known = about(settings, model, args.model or "the embedded model") | {"adapter": args.adapter}
    if tasks:
        eval_data.check(sets, plan, settings, tokenizer)
        _check_lengths(plan, settings, model, tokenizer)
    read = eval_texts.prepare(args, plan, model, tokenizer) if reads_texts else None
    n_failed = 0
    if tasks:
        n_failed += _ask(args, out, model, tokenizer, plan, settings, known, sets)
    if read:
        n_failed += eval_texts.go_on(args, out, model, *read, settings, known)
    return 1 if n_failed else 0


def _ask(args: argparse.Namespace, out: Path, model, tokenizer, plan, settings, known: dict, sets) -> int:
    """Ask all tasks; returns how many answers of our caches failed."""
    from hf_kvcache.eval.lines import Lines, OtherRun

    try:
        lines = Lines(out / LINES, known)
    except OtherRun as error:
        raise UserError(f"--out: {error}") from error
    eval_data.write(sets, out)
    try:
        _evaluate(model, tokenizer, plan, settings, lines)
    except KeyboardInterrupt:
        _show(args, out, known, lines, settings)
        print(f"hf-kvcache eval: interrupted; the same command goes on from {out / LINES}", file=sys.stderr)
        raise
    _show(args, out, known, lines, settings)
    # a peer that does not run here is no failure of ours
    ours = {spec.text for spec in plan.specs if not spec.is_peer}
    return sum(bool(line.error) and line.cache in ours for line in lines)


def _plan(args: argparse.Namespace, tasks, typed, model):
    from hf_kvcache.eval.compare import with_baseline
    from hf_kvcache.eval.running import Plan
    from hf_kvcache.eval.specs import default_specs

    specs = with_baseline(default_specs(retrofitted(model)) if typed is None else typed)
    unique = {spec.text: spec for spec in specs}
    lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
    n_instances = args.instances or (QUICK_INSTANCES if args.quick else INSTANCES)
    chosen = tuple(name for name in SETTINGS if name in args.settings)
    return Plan(tasks, tuple(dict.fromkeys(lengths)), n_instances, chosen, tuple(unique.values()), args.batch_size)


def _check_lengths(plan, settings, model, tokenizer) -> None:
    """Raise UserError where prompts with their answers are longer than the model reads, or shorter than a task."""
    from hf_kvcache.eval.prompts import Prompter
    from hf_kvcache.eval.running import most_tokens

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    n = max(plan.lengths)
    if n <= most:
        prompter = Prompter(tokenizer, settings.uses_template)
        try:
            n = most_tokens(plan, prompter, settings)
        except ValueError as error:
            beside = f" ({prompter.n_added()} more stand around the text)" if "needs at least" in str(error) else ""
            raise UserError(f"{error}{beside}") from error
    if n > most:
        raise UserError(f"--lengths: this model reads at most {most:,} tokens, not {n:,} (answers included)")


def _evaluate(model, tokenizer, plan, settings, lines) -> None:
    from hf_kvcache.commands.progress import shown
    from hf_kvcache.eval.running import evaluate

    with shown(plan.n_lines(settings)) as advance:
        evaluate(model, tokenizer, plan, settings, lines, advance)


def _show(args: argparse.Namespace, out: Path, known: dict, lines, settings) -> None:
    """Summaries to the folder and to standard output."""
    from hf_kvcache.commands.progress import publish
    from hf_kvcache.eval.summary import summarise
    from hf_kvcache.eval.tables import CAPTION, as_markdown, as_tables

    files, rows = (out / RESULT, out / TABLE), summarise(lines, settings.n_questions)
    publish(rows, known, lines, files, as_markdown, lambda rows: (*as_tables(rows), CAPTION), args.json)
