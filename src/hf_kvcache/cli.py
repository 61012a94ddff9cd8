"""The console script `hf-kvcache`: one subcommand per module of `hf_kvcache.commands`.

A command module's docstring opens with its one-line help; it offers `add_arguments(parser)` and `run(args)`, which
returns the exit code or None, and maybe `PARSER`, options of its parser. torch and transformers are imported inside
`run`, so that `--help` does not wait.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from hf_kvcache.commands import UserError

COMMANDS = (
    "compare",
    "eval",
    "report",
    "tune",
    "check",
    "generate",
    "calibrate",
    "train",
    "export",
    "kernel",
    "push",
    "models",
    "methods",
    "doctor",
    "lm-eval",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-kvcache", description="KV-cache compression for transformers models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"hf_kvcache.commands.{name.replace('-', '_')}")
        summary = module.__doc__.splitlines()[0].rstrip(".")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **getattr(module, "PARSER", {}),
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 for success, 1 for a job that failed, 2 for a mistake in the arguments."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"hf-kvcache {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
