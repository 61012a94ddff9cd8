"""Write a model with its compressed cache as a repository that needs only transformers.

    hf-kvcache export --method quant:bits=4 --out llama-4bit
    hf-kvcache export --method palu --adapter my-bases --out llama-palu
    hf-kvcache export --model my-dmc --method dmc --out llama-dmc

`AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True).generate(...)` then uses that cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, load_model, parse_specs

NAMES = {"palu": "lowrank", "mustafar": "sparse"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("repository")
    group.add_argument(
        "--method",
        required=True,
        metavar="SPEC",
        help="palu, mustafar, locret, dmc, dms, quant with arguments (quant:bits=4), or a cache as in `compare`",
    )
    group.add_argument("--out", required=True, metavar="DIR", help="folder to write")


def run(args: argparse.Namespace) -> None:
    name, colon, rest = args.method.partition(":")
    spec = parse_specs([NAMES.get(name, name) + colon + rest])[0]
    if spec.is_peer:
        raise UserError(f"--method {args.method}: that is transformers' own cache, which needs no repository")
    model, tokenizer = load_model(args)
    from hf_kvcache.hub.export import export

    command = shlex.join(["hf-kvcache", *sys.argv[1:]])
    try:
        where = export(model, spec.build(model.config), args.out, tokenizer=tokenizer, command=command)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error
    code = sum(path.stat().st_size for path in where.glob("*.py"))
    print(json.dumps({"directory": str(where), "files": len(list(where.iterdir())), "bytes_of_code": code}))
