"""Arguments and loading shared by the commands that run a model."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from hf_kvcache.commands import UserError

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ATTENTION = ("hf_kvcache", "sdpa", "eager")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="Hub id, local folder or a name of `hf-kvcache models list` (default: the embedded model)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="weights and cache (default: what the model was saved in)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    group.add_argument(
        "--adapter",
        metavar="ID_OR_PATH",
        help="retaining heads or low-rank bases to attach (default for the embedded model: its own heads)",
    )
    group.add_argument(
        "--attn", choices=ATTENTION, default="hf_kvcache", help="attention implementation (default: %(default)s)"
    )


def load_model(args: argparse.Namespace):
    """Model in evaluation mode, and its tokenizer.

    Raises:
        UserError: the model, its tokenizer, its adapter or the device is not there.
    """
    import torch
    from transformers import AutoTokenizer

    from hf_kvcache.models import embedded_model, resolve

    where = args.model
    if where is None:
        where = embedded_model()
        if not (where / "config.json").exists():
            raise UserError("this installation has no embedded model; name one with --model ID_OR_PATH")
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else "auto"
    try:
        device = torch.device(args.device) if args.device else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    try:
        where = resolve(where)
        # the model first: it makes the type of a retrofit known
        model = _from_pretrained(where, dtype=dtype, attn_implementation=args.attn)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        said = f"cannot load the model {str(where)!r}: {str(error).splitlines()[0]}"
        raise UserError(said + _meant(str(args.model))) from error
    model = model.to(device).eval()
    _attach(model, args)
    return model, tokenizer


def _meant(name: str) -> str:
    """The known model whose name was mistyped, as the end of an error."""
    from difflib import get_close_matches

    from hf_kvcache.models.known import MODELS

    near = get_close_matches(name.lower(), MODELS, 1)
    return f" (is {near[0]!r} meant?)" if near and name not in MODELS else ""


def _from_pretrained(where, **kwargs):
    """A model of transformers, or one of our retrofits."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    from hf_kvcache import dmc

    config, _ = PreTrainedConfig.get_config_dict(where)
    load = dmc.load if "kv_dmc" in config else AutoModelForCausalLM.from_pretrained
    return load(where, **kwargs)


def retrofitted(model) -> str | None:
    """What a model is retrofitted for: "dmc", "dms", or None."""
    from hf_kvcache.dmc import retrofits

    return next((child.settings.method for child in retrofits(model).values()), None)


def _attach(model, args: argparse.Namespace) -> None:
    from hf_kvcache.models import embedded_heads

    where = args.adapter
    if where is None:
        # without PEFT the embedded model runs without heads, and only caches that need them say so
        if args.model is not None or find_spec("peft") is None:
            return
        where = embedded_heads()
    try:
        from hf_kvcache.adapters import attach

        attach(model, str(where))
    except (ImportError, ValueError) as error:
        raise UserError(f"--adapter: {error}") from error


def default_device():
    """The accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def read_text(path: str | Path, option: str) -> str:
    """A text file in UTF-8; `option` is the argument that an error names."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {str(path)!r} as UTF-8 text: {error}") from error


def parse_specs(texts: list[str]):
    """Cache specifications as typed; raises UserError for a name or an argument that does not exist."""
    from hf_kvcache.eval.specs import SpecError, parse

    try:
        specs = [parse(text) for text in texts]
        for spec in specs:
            spec.check()
    except SpecError as error:
        raise UserError(str(error)) from error
    return specs


def check_writable(folder: Path, option: str, names: tuple[str, ...] = ()) -> None:
    """Find out before anything is computed that files could not be written to a folder.

    Args:
        folder: where something will be written. It is made for the test and taken away again, unless it was there.
        option: the argument that an error names.
        names: files that will be written, each of which may be there already.

    Raises:
        UserError: the folder, or one of the files, cannot be written.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        with suppress(OSError):  # somebody else may be writing there
            for path in missing:
                path.rmdir()
        for path in (folder / name for name in names):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise UserError(f"{option}: cannot write to {str(folder)!r}: {error}") from error


def say_written(where: Path) -> None:
    """Print what a repository on disk is made of, one JSON line."""
    files = [path for path in where.rglob("*") if path.is_file()]
    code = sum(path.stat().st_size for path in files if path.suffix == ".py")
    print(json.dumps({"directory": str(where), "files": len(files), "bytes_of_code": code}))
