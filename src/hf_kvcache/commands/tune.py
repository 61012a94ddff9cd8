"""Share out bytes or loss among the layers of a model: which bits, tokens and channels each of them keeps.

    hf-kvcache tune --model M --text a.txt b.txt --bytes 0.125 --out tuned
    hf-kvcache tune --model M --text a.txt b.txt --max-kl 0.02 --out tuned
    hf-kvcache tune --model M --text a.txt b.txt --tokens-per-second 30 --out tuned

What every layer loses by bits, sparsity, low rank (where the model carries bases) and eviction is measured on pieces of
the texts and on needles whose questions come after the cache has compressed; the bytes go where they save most. Then
the whole cache is measured, what the sum of the parts got wrong is put right, and the best one is written to
OUT/kv_cache_config.json: `--caches config:OUT` in `compare` and `eval`, `export --config OUT`, `KVCache.from_config`.

Bytes are those of real caches at --context tokens, as a share of a dense cache's; speed is that of this machine at that
length, for one text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, check_writable, load_model, read_text
from hf_kvcache.commands.numbers import count, positive, share, weight

POLICIES = ("keydiff", "snapkv", "kvzip")
NEXT = 64  # tokens of a piece of prose that are predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("goal")
    goal = group.add_mutually_exclusive_group(required=True)
    goal.add_argument("--bytes", type=share, metavar="SHARE", help="most bytes, as a share of a dense cache's")
    goal.add_argument("--max-kl", type=weight, metavar="NATS", help="most KL of prose, nats per token")
    goal.add_argument("--tokens-per-second", type=weight, metavar="N", help="least speed of decoding one text, here")
    group.add_argument(
        "--needle-weight",
        type=weight,
        default=1.0,
        metavar="W",
        help="what a nat at the answers of needles counts beside one of prose (default: %(default)s)",
    )
    add_text_arguments(parser)
    group = parser.add_argument_group("caches")
    group.add_argument(
        "--policies",
        nargs="*",
        default=list(POLICIES),
        metavar="NAME",
        help=f"that layers may evict by, best one taken (default: {' '.join(POLICIES)}; none: no eviction)",
    )
    group.add_argument("--rounds", type=positive, default=4, metavar="N", help="of measuring (default: %(default)s)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of kv_cache_config.json, or a *.json file")


def add_text_arguments(parser: argparse.ArgumentParser, n_prose: int = 4, n_needles: int = 4) -> None:
    """What the model reads."""
    group = parser.add_argument_group("texts")
    group.add_argument("--text", nargs="+", metavar="FILE", help="prose, in files (default: the package's own)")
    group.add_argument(
        "--context", type=positive, default=1024, metavar="N", help="tokens that are read (default: %(default)s)"
    )
    group.add_argument("--pieces", type=positive, default=n_prose, metavar="N", help="of prose (default: %(default)s)")
    group.add_argument(
        "--needles", type=count, default=n_needles, metavar="N", help="texts with needles (default: %(default)s)"
    )
    group.add_argument("--seed", type=count, default=0, metavar="N", help="of the needles (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from hf_kvcache.cache_config import FILE, ConfigError, KVCacheConfig
    from hf_kvcache.long_prompts import reads_twice
    from hf_kvcache.tuning.tuner import Goal, Tuner, described

    out = Path(args.out)
    folder, name = (out.parent, out.name) if out.suffix == ".json" else (out, FILE)
    check_writable(folder, "--out", (name,))
    policies = [_policy(name) for name in args.policies]
    documents = read_documents(args)
    model, tokenizer = load_model(args)
    texts = texts_of(args, tokenizer, documents)
    with progress() as advance:
        try:
            tuner = Tuner(model, texts, policies, names_for(model), advance)
            goal = Goal(args.bytes, args.max_kl, args.tokens_per_second, args.needle_weight)
            found = tuner.tune(goal, args.rounds)
            about = _about(args, model, documents) | described(found)
            config = KVCacheConfig.from_cache(found.cache, **about)
        except (ValueError, ConfigError) as error:
            raise UserError(str(error)) from error
    path = config.save(out)
    shown = {name: value for name, value in about.items() if name not in ("trials", "model")}
    print(json.dumps({"config": str(path)} | shown))
    if reads_twice(found.cache):
        name = type(found.cache.policy).__name__
        print(
            f"{name} reads a prompt twice: fill this cache by hf_kvcache.prefill; it cannot be exported "
            "(what can: --policies keydiff snapkv)",
            file=sys.stderr,
        )


def names_for(model) -> list[str]:
    """Codecs that layers of a model may have: latents of as many directions as all bases have that it carries."""
    from hf_kvcache.adapters.modules import attached_basis
    from hf_kvcache.codecs.lowrank import channels_of
    from hf_kvcache.tuning.menu import BITS, RANKS, SPARSE, share_of

    found = [attached_basis(module, side) for module in model.modules() for side in "kv"]
    bases = [basis for basis, _ in filter(None, found)]
    fits = [name for name in RANKS if all(channels_of(share_of(name), b.width) <= b.rank for b in bases)]
    return [*BITS, *SPARSE, *(fits if bases else ())]


def read_documents(args: argparse.Namespace) -> list[str]:
    """The prose that is named, or the package's own."""
    from hf_kvcache.models import embedded_prose

    if args.text:
        return [read_text(path, "--text") for path in args.text]
    return [read_text(embedded_prose(), "the package's own text")]


def texts_of(args: argparse.Namespace, tokenizer, documents: list[str]):
    """What is read: pieces of prose, and needles in prose of the package."""
    from hf_kvcache.tuning.probes import needle_texts, prose_texts

    try:
        prose = prose_texts(tokenizer, documents, args.context, NEXT, args.pieces)
        return prose + needle_texts(tokenizer, args.context, args.needles, args.seed)
    except ValueError as error:
        raise UserError(str(error)) from error


def digest_of(documents: list[str]) -> str:
    """What tells one set of texts from another."""
    import hashlib

    return hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]


def progress():
    """A line on standard error that says what is being done: `with progress() as advance: advance("...")`."""
    from contextlib import contextmanager
    from time import monotonic

    @contextmanager
    def shown():
        started, ending = monotonic(), "\r" if sys.stderr.isatty() else "\n"

        def advance(stage: str) -> None:
            print(f"{monotonic() - started:5.0f} s  {stage:<60}", end=ending, file=sys.stderr, flush=True)

        yield advance
        if ending == "\r":
            print(f"{'':<70}", end=ending, file=sys.stderr)

    return shown()


def _policy(name: str):
    from hf_kvcache import registry
    from hf_kvcache.policies.base import Policy

    try:
        kind = registry.load(registry.method(name).factory)
    except ValueError as error:
        raise UserError(f"--policies: {error}") from error
    plain = isinstance(kind, type) and issubclass(kind, Policy)
    if not plain or kind.takes_budget != "yes" or kind.is_trained:
        raise UserError(f"--policies: {name} has no share of the tokens that could be set")
    return kind(ratio=1.0)


def _about(args: argparse.Namespace, model, documents: list[str]) -> dict:
    from hf_kvcache import __version__
    from hf_kvcache.fingerprint import fingerprint

    attention = next(m for m in model.modules() if getattr(m, "layer_idx", None) is not None and hasattr(m, "scaling"))
    goal = {name: getattr(args, name) for name in ("bytes", "max_kl", "tokens_per_second")}
    return {
        "made_by": f"hf-kvcache tune, hf_kvcache {__version__}",
        "goal": {name: x for name, x in goal.items() if x is not None} | {"needle_weight": args.needle_weight},
        "model": {"name": args.model or "the embedded model"} | fingerprint(attention),
        "dtype": str(model.dtype).removeprefix("torch."),
        "texts": {
            "digest": digest_of(documents),
            "context": args.context,
            "pieces": args.pieces,
            "needles": args.needles,
            "seed": args.seed,
        },
    }
