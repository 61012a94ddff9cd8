"""Say what runs here: versions, devices, and the backend of every op with the reason."""

from __future__ import annotations

import argparse

PACKAGES = "hf_kvcache torch transformers triton peft safetensors optimum-quanto hqq matplotlib".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    import json

    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)


def examine() -> dict:
    """Versions, devices, backends and the native build, as plain data."""
    import platform

    from hf_kvcache.bench.environment import version

    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "devices": devices(),
        "backends": backends(),
        "native": native(),
    }


def devices() -> dict[str, str]:
    """Every device that torch sees, with its name."""
    import torch

    from hf_kvcache.bench.environment import processor

    found = {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    return found | {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def backends() -> list[dict[str, str]]:
    """Which backend runs each op on each kind of device, and why; compiles native code where that is due."""
    import torch

    from hf_kvcache.kernels import BackendUnavailable, choose
    from hf_kvcache.kernels.native import OPS

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for op in OPS:
        for kind in kinds:
            try:
                choice = choose(op, torch.device(kind))
                rows.append({"op": op, "device": kind, "backend": choice.backend, "reason": choice.reason})
            except BackendUnavailable as error:
                rows.append({"op": op, "device": kind, "backend": "none", "reason": str(error)})
    return rows


def native() -> dict[str, str]:
    """Compiler, instruction set and cache folder of the native code, or why there is none."""
    from hf_kvcache.kernels import native as builder

    found = {}
    for name, ask in (("compiler", lambda: " ".join(builder.compiler())), ("instruction set", builder.instruction_set)):
        try:
            found[name] = ask()
        except builder.BuildError as error:
            found[name] = f"none: {error}"
    found["instruction sets of this CPU"] = ", ".join(builder.supported())
    found["cache folder"] = str(builder.cache_folder())
    return found


def _print(found: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title in ("versions", "devices", "native"):
        table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
        for name, value in found[title].items():
            table.add_row(name, value or "[dim]not installed[/dim]")
        console.print(table)
    table = Table(title="backends", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("op", "device", "backend", "reason"):
        table.add_column(name, overflow="fold")
    for row in found["backends"]:
        table.add_row(*row.values())
    console.print(table)
