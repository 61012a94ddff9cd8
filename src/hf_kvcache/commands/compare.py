"""One model, one text, many caches: bytes, speed and fidelity side by side.

A cache is a name and its arguments: quant:bits=4,rotate=true   sparse:sparsity=0.7,bits=4   keydiff:ratio=0.25
`+` puts an eviction policy over a cache:   keydiff:ratio=0.5+quant:bits=8
`hf-kvcache methods` lists the names. transformers' DynamicCache always runs: it is what the ratios refer to.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, load_model, parse_specs, read_text, retrofitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--caches", nargs="+", metavar="SPEC", help="caches to compare (default: all methods)")
    group.add_argument("--text", metavar="FILE", help="prose to read and predict (default: the package's own)")
    group.add_argument("--context", type=_positive, metavar="N", help="tokens for bytes and speed (default: 4096)")
    group.add_argument(
        "--eval-context", type=_positive, metavar="N", help="tokens for perplexity, KL and retrieval (default: 2048)"
    )
    group.add_argument(
        "--new-tokens", type=_positive, default=32, metavar="N", help="tokens decoded per round (default: %(default)s)"
    )
    group.add_argument(
        "--rounds", type=_positive, default=3, metavar="N", help="timed generations per cache (default: %(default)s)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="also write compare.json and compare.png there")
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from hf_kvcache.adapters.modules import attached_heads
    from hf_kvcache.eval.compare import with_baseline
    from hf_kvcache.eval.report import as_dict, as_table
    from hf_kvcache.eval.specs import default_specs

    typed = parse_specs(args.caches) if args.caches else None
    text = _text(args)
    model, tokenizer = load_model(args)
    carries_heads = any(attached_heads(module) is not None for module in model.modules())
    specs = with_baseline(default_specs(carries_heads, retrofitted(model)) if typed is None else typed)
    settings = _settings(args, model.config)
    rows = _measure(model, tokenizer, text, specs, settings)
    name = args.model or "the embedded model"
    result = as_dict(rows, settings, model, name)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        title = f"{name}, {result['dtype']}, {result['device']}"
        console = Console()
        # a pipe or a log has no width of its own
        console = console if console.is_terminal else Console(width=130)
        console.print(as_table(rows, settings, title))
    if args.out:
        _write(Path(args.out), result, rows)
    # a peer that does not run here is no failure of ours
    return 1 if any(row.error and not row.is_peer for row in rows) else 0


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
        context=context, eval_context=eval_context, n_new=args.new_tokens, rounds=args.rounds, attention=args.attn
    )


def _measure(model, tokenizer, text, specs, settings):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hf_kvcache.eval.compare import compare, n_stages

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=n_stages(len(specs), settings), completed=-1)
        try:
            return compare(
                model,
                tokenizer,
                text,
                specs,
                settings,
                lambda stage: progress.update(task, advance=1, description=stage),
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


def _write(folder: Path, result: dict, rows) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(folder)!r}: {error}") from error
    try:
        from hf_kvcache.eval.picture import save_picture
    except ImportError:
        print("no picture: matplotlib is not installed (pip install hf_kvcache[plot])", file=sys.stderr)
        return
    save_picture(rows, folder / "compare.png", f"{result['model']}, {result['dtype']}, {result['device']}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
