"""One model, one text, many caches: bytes, speed and fidelity side by side.

A cache is a name and its arguments: quant:bits=4,rotate=true   sparse:sparsity=0.7,bits=4   keydiff:ratio=0.25
`+` puts an eviction policy over a cache:   keydiff:ratio=0.5+quant:bits=8
`hf-kvcache methods` lists the names. transformers' DynamicCache always runs: it is what the ratios refer to.
`lowrank` fits its bases to each prompt where the model carries none; `hf-kvcache calibrate lowrank` makes better ones.

With `--out DIR`, DIR/compare.jsonl has what is measured, then a line for every step of every row: an interrupted
comparison keeps it. DIR/compare.json and DIR/compare.png are written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import (
    add_model_arguments,
    check_writable,
    load_model,
    parse_specs,
    read_text,
    retrofitted,
)
from hf_kvcache.commands.numbers import positive

LINES, RESULT, PICTURE = "compare.jsonl", "compare.json", "compare.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("what to measure")
    caches = group.add_mutually_exclusive_group()
    caches.add_argument(
        "--caches", nargs="+", metavar="SPEC", help="caches to compare (default: ten that help to choose)"
    )
    caches.add_argument("--all", action="store_true", help="compare every method, and more settings of them")
    group.add_argument("--text", metavar="FILE", help="prose to read and predict (default: the package's own)")
    group.add_argument("--context", type=positive, metavar="N", help="tokens for bytes and speed (default: 4096)")
    group.add_argument(
        "--eval-context", type=positive, metavar="N", help="tokens for perplexity, KL and retrieval (default: 2048)"
    )
    group.add_argument(
        "--new-tokens", type=positive, default=32, metavar="N", help="tokens decoded per round (default: %(default)s)"
    )
    group.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="timed generations per cache (default: %(default)s)"
    )
    group.add_argument(
        "--speed-only", action="store_true", help="bytes and speed alone, for `hf-kvcache report --speed`"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", metavar="DIR", help=f"also write there: {LINES} as it goes, {RESULT} and {PICTURE} at the end"
    )
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")
    group.add_argument(
        "--pareto", action="store_true", help="also print the front of KL over bytes, and what beats the other caches"
    )


def run(args: argparse.Namespace) -> int:
    from hf_kvcache.commands.rows import Rows
    from hf_kvcache.eval.journal import Journal
    from hf_kvcache.eval.report import about

    typed = parse_specs(args.caches) if args.caches else None
    if args.pareto and args.speed_only:
        raise UserError("--pareto: KL over bytes takes KL; leave out --speed-only")
    text = _text(args)
    out = None if args.out is None else Path(args.out)
    if out is not None:
        check_writable(out, "--out", (LINES, RESULT, PICTURE))
    model, tokenizer = load_model(args)
    specs = _specs(typed, args.all, model)
    settings = _settings(args, model.config)
    known = about(settings, model, args.model or "the embedded model")
    journal = None if out is None else Journal(out / LINES, known)
    rows = Rows([spec.text for spec in specs], settings, known, args.json, journal, args.pareto)
    try:
        _measure(model, tokenizer, text, specs, settings, rows.take)
    except KeyboardInterrupt:
        rows.show(is_whole=False)
        kept = "" if out is None else f"; {out / LINES} has what was measured"
        print(f"hf-kvcache compare: interrupted{kept}", file=sys.stderr)
        raise
    rows.show(is_whole=True)
    if out is not None:
        _write(out, rows)
    # a peer that does not run here is no failure of ours
    return 1 if any(row.error and not row.is_peer for row in rows.found) else 0


def _specs(typed, is_whole: bool, model):
    """The caches to compare, the baseline first."""
    from hf_kvcache.adapters.modules import attached_heads
    from hf_kvcache.eval.compare import with_baseline
    from hf_kvcache.eval.specs import all_specs, default_specs

    if typed is not None:
        return with_baseline(typed)
    if not is_whole:
        return with_baseline(default_specs(retrofitted(model)))
    carries_heads = any(attached_heads(module) is not None for module in model.modules())
    return with_baseline(all_specs(carries_heads, retrofitted(model)))


def _settings(args: argparse.Namespace, config):
    """Settings within what the model can read."""
    from hf_kvcache.eval.compare import Settings

    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    context = args.context or min(4096, most - args.new_tokens)
    eval_context = args.eval_context or min(2048, context)
    for option, n in (("--context", context + args.new_tokens), ("--eval-context", eval_context)):
        if n > most:
            raise UserError(f"{option}: this model reads at most {most} tokens, not {n} (new tokens included)")
    if eval_context < 64:
        raise UserError(f"--eval-context: {eval_context} tokens are too few to measure on; use at least 64")
    return Settings(
        context=context,
        eval_context=eval_context,
        n_new=args.new_tokens,
        rounds=args.rounds,
        attention=args.attn,
        scores=not args.speed_only,
    )


def _measure(model, tokenizer, text, specs, settings, take) -> None:
    from re import escape
    from warnings import catch_warnings, filterwarnings

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hf_kvcache.codecs.fitting import FITTED
    from hf_kvcache.eval.compare import compare, n_stages

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, catch_warnings():
        # said in the help of this command: here it is no mistake
        filterwarnings("ignore", message=f".*{escape(FITTED)}")
        task = progress.add_task("", total=n_stages(len(specs), settings), completed=-1)
        try:
            compare(
                model,
                tokenizer,
                text,
                specs,
                settings,
                lambda stage: progress.update(task, advance=1, description=stage),
                take,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


def _text(args: argparse.Namespace) -> str:
    from hf_kvcache.models import embedded_prose

    if args.text:
        return read_text(args.text, "--text")
    if not embedded_prose().exists():
        raise UserError("this installation has no text of its own; name one with --text FILE")
    return read_text(embedded_prose(), "the package's own text")


def _write(folder: Path, rows) -> None:
    try:
        (folder / RESULT).write_text(json.dumps(rows.result(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(folder)!r}: {error}") from error
    try:
        from hf_kvcache.eval.picture import save_picture
    except ImportError:
        print("no picture: matplotlib is not installed (pip install hf_kvcache[plot])", file=sys.stderr)
        return
    save_picture(rows.found, folder / PICTURE, rows.title)
