"""Whether a cache hurts a model, before it is deployed: passed, failed or undecided, and which layers are to blame.

    hf-kvcache check --model M --cache quant:bits=4
    hf-kvcache check --model M --config tuned --text a.txt b.txt --context 4096

Texts are read and compressed before anything is known of what comes, and the same is done behind the dense cache:
  numbers  no logit may be NaN or infinite
  prose    pieces of the texts are gone on with through the compressed cache: KL to the dense model, perplexity, first
           choices that stay the same
  needles  facts hidden in prose are asked for, and the answers are decoded: those lost that the dense model finds
  decode   with --decode N the model goes on greedily after the prose: what it says again and again
  bytes    of the caches, really measured, as a share of the dense cache's

A limit is of the mean over texts. That passes where its 95 % interval lies below the limit, fails where it lies above,
and is undecided in between, or where the dense model itself cannot do what is asked: more texts or others are needed.
Exit code 0: passed; 1: failed or undecided; 2: a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, load_model, parse_specs
from hf_kvcache.commands.numbers import count, points, share, weight
from hf_kvcache.commands.tune import add_text_arguments, digest_of, progress, read_documents

# of prose, fed through the compressed cache: more than a recent window that stays dense
N_NEXT = 128
N_PIECES, N_NEEDLES = 8, 32
# texts that blame is laid by
N_BLAMED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("cache")
    group = group.add_mutually_exclusive_group(required=True)
    group.add_argument("--cache", metavar="SPEC", help="as in `hf-kvcache compare`")
    group.add_argument("--config", metavar="PATH", help="cache that a file describes, such as `hf-kvcache tune` writes")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-kl",
        type=weight,
        default=0.05,
        metavar="NATS",
        help="most KL of prose, nats per token; 0.05 makes what the dense model would write 5 %% more perplexing "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-loss",
        type=points,
        default=10.0,
        metavar="POINTS",
        help="most needles lost, of 100; 32 texts without a loss pass 8.2 and more (default: %(default)s)",
    )
    group.add_argument(
        "--max-repeats",
        type=points,
        default=30.0,
        metavar="POINTS",
        help="with --decode: most sequences of four tokens, of 100, said again beside the dense model's; "
        "8 pieces without a difference pass 27.8 and more (default: %(default)s)",
    )
    group.add_argument(
        "--max-bytes", type=share, metavar="SHARE", help="most bytes, as a share of a dense cache's (default: any)"
    )
    add_text_arguments(parser, N_PIECES, N_NEEDLES)
    group = parser.add_argument_group("how")
    group.add_argument(
        "--decode",
        type=count,
        default=0,
        metavar="N",
        help="tokens that the model says by itself after every piece of prose (default: %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    from hf_kvcache.eval.verdicts import FAILED, PASSED, Limits, judge, overall

    (spec,) = parse_specs([f"config:{args.config}" if args.cache is None else args.cache])
    documents = read_documents(args)
    _say_seen(spec, documents)
    model, tokenizer = load_model(args)
    windows, needles = _texts(args, model, tokenizer, documents)
    with progress() as advance:
        pieces, found = _measure(args, model, tokenizer, spec, windows, needles, advance)
        limits = Limits(args.max_kl, args.max_loss, args.max_repeats, args.max_bytes)
        verdicts = judge(pieces, found, limits)
        failed = {verdict.name for verdict in verdicts if verdict.verdict == FAILED}
        blamed, why_not = [], None
        if "numbers" not in failed and failed & {"prose", "needles"}:
            advance("who is to blame")
            blamed, why_not = _blame(args, model, spec, windows if "prose" in failed else [], needles, found)
    about = {
        "model": args.model or "the embedded model",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "cache": spec.text,
        "context": args.context,
        "pieces": len(pieces),
        "needles": len(found),
        "seed": args.seed,
    }
    verdict = overall(verdicts)
    if args.json:
        lists = {"checks": verdicts, "blame": blamed}
        lists = {name: [asdict(one) for one in of] for name, of in lists.items()}
        print(json.dumps(about | {"verdict": verdict} | lists | {"not_blamed": why_not}, indent=1))
    else:
        _show(about, verdicts, blamed, why_not, verdict)
    return 0 if verdict == PASSED else 1


def _say_seen(spec, documents: list[str]) -> None:
    """Warn of a cache that was tuned on the texts that it is checked on."""
    texts = getattr(getattr(spec, "config", None), "about", {}).get("texts")
    if isinstance(texts, dict) and texts.get("digest") == digest_of(documents):
        print("hf-kvcache check: this cache was tuned on these texts; others tell more: --text FILE", file=sys.stderr)


def _texts(args: argparse.Namespace, model, tokenizer, documents: list[str]) -> tuple[list[list[int]], list]:
    """Windows of prose, none of which overlap, and texts with needles."""
    from hf_kvcache.eval.check_texts import needle_texts
    from hf_kvcache.eval.windows import Windows

    n_tokens = args.context + N_NEXT + 1
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if n_tokens + args.decode > most:
        n = n_tokens + args.decode
        raise UserError(f"--context: this model reads at most {most:,} tokens, not {n:,} (what follows included)")
    prose = Windows(tokenizer, tuple(documents), args.seed)
    n_there = len(prose.places(n_tokens))
    if n_there < args.pieces:
        raise UserError(
            f"--pieces: there are {n_there} of {n_tokens:,} tokens, not {args.pieces}; give longer texts (--text), "
            "fewer pieces or a shorter --context"
        )
    try:
        needles = needle_texts(tokenizer, args.context, args.needles, args.seed)
    except ValueError as error:
        raise UserError(f"--context: {error}") from error
    return [prose.window(i, n_tokens) for i in range(args.pieces)], needles


def _measure(args: argparse.Namespace, model, tokenizer, spec, windows, needles, advance):
    from hf_kvcache.eval.checking import Check
    from hf_kvcache.eval.running import Settings

    check = Check(model, tokenizer, spec, Settings(attention=args.attn), advance)
    try:
        return check.go_on(windows, args.context, args.decode), check.ask(needles)
    except (ValueError, ImportError) as error:
        # such as a cache that needs bases, heads or a retrofitted model, or arguments that this model cannot have
        raise UserError(str(error)) from error


def _blame(args: argparse.Namespace, model, spec, windows, needles, found) -> tuple[list, str | None]:
    """Sides of layers, and why none can be blamed."""
    from hf_kvcache.tuning.culprits import NobodyToBlame, culprits
    from hf_kvcache.tuning.probes import Text

    if spec.is_peer or spec.is_learned:
        return [], "only caches of this package are taken apart, and no retrofitted models"
    texts = [Text("text", w[: args.context], w[args.context :], list(range(N_NEXT))) for w in windows]
    if not windows:
        lost = [text for text, one in zip(needles, found, strict=True) if one.score < one.dense_score]
        texts = [Text("needle", text.context, *one.with_answer()) for text in lost for one in text.asked]
    try:
        return culprits(model, texts[:N_BLAMED], lambda: spec.build(model.config)), None
    except NobodyToBlame as error:
        return [], str(error)


def _show(about: dict, verdicts: list, blamed: list, why_not: str | None, verdict: str) -> None:
    """Lines for people, the verdict last."""
    from textwrap import fill

    lines = [
        f"{about['cache']} behind {about['model']} ({about['dtype']}, {about['device']}), {about['context']:,} tokens "
        f"read: {about['pieces']} pieces of prose, {about['needles']} texts with needles"
    ]
    for one in verdicts:
        todo = f"; {one.todo}" if one.todo else ""
        lines.append(f"{one.verdict or '':<10} {one.name:<8} {one.says}{todo}")
    blamed = [f"no layer can be told: {why_not}"] if why_not else blamed
    lines += [f"{'':<10} {'blame':<8} {one}" for one in blamed]
    for line in [*lines, verdict]:
        print(fill(line, 118, subsequent_indent=" " * 20))
