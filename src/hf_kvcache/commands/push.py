"""Upload what `export` or `kernel` wrote to the Hub.

    hf-kvcache push llama-palu org/llama-palu
    hf-kvcache push built/quant_attention org/quant-attention

A model goes to the main branch; a kernel to that of its version, `v1`, and its card to the main one.
"""

from __future__ import annotations

import argparse

from hf_kvcache.commands import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="folder that `hf-kvcache export` or `hf-kvcache kernel` wrote")
    parser.add_argument("repository", metavar="REPO", help="NAME or ORGANISATION/NAME on the Hub; made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to (default: see above)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    from hf_kvcache.hub.push import push

    options = {"private": args.private or None, "revision": args.revision, "message": args.message}
    try:
        print(push(args.directory, args.repository, **options))
    except (ValueError, OSError, HfHubHTTPError) as error:
        raise UserError(str(error)) from error
