"""The README of an adapter: how to load it, before anything else, for none of PEFT's loaders can say so."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

_LOADING = """```bash
pip install hf_kvcache "peft>=0.21"
```

```python
import hf_kvcache as kv  # makes this kind of adapter known to PEFT and transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
kv.attach(model, "this repository")  # or a folder; PeftModel.from_pretrained and model.load_adapter do, too
{cache}
model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache
```

Without `import hf_kvcache`, PEFT and transformers stop with a `KeyError` that names the kind of this adapter."""

_TEXT = """---
{metadata}
---

# {what}

{loading}

{fit} It was made by hf_kvcache {version}.
"""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PLACEHOLDER = "Use the code below to get started with the model.\n\n[More Information Needed]"


Card = tuple[str, str, str]  # what an adapter is, its tag on the Hub, and the line that makes a cache


def write(directory: Path, config: Mapping, card: Card) -> None:
    """Put a README into the folder of an adapter, unless there is one.

    One that PEFT has made of its template gets the code where the template leaves it open; one that somebody wrote
    stays as it is.

    Args:
        directory: the folder.
        config: of the adapter.
        card: of its kind.
    """
    path = directory / "README.md"
    try:
        # "x": what a link in the folder points at is not written to
        with open(path, "x", encoding="utf-8") as file:
            file.write(card_of(config, card))
    except FileExistsError:
        _fill_in(path, config, card)


def card_of(config: Mapping, card: Card) -> str:
    """The whole README of an adapter, with metadata for the Hub."""
    what, tag, _ = card
    data = ModelCardData(
        base_model=_base(config),
        library_name="hf_kvcache",
        pipeline_tag="text-generation",
        tags=["kv-cache", "kv-cache-compression", "peft", tag],
    )
    base = _base(config) or "one model"
    fit = f"The adapter is for {base} alone, whose fingerprint it carries: others are refused."
    if config.get("fingerprint") is None:
        fit = "The adapter says of no model that it is for that one: it fits all of its shapes."
    version = config.get("hf_kvcache_version")
    return _TEXT.format(metadata=data.to_yaml(), what=what, loading=loading(config, card), fit=fit, version=version)


def loading(config: Mapping, card: Card) -> str:
    """Commands and code that load an adapter."""
    cache = card[2].format(method=(config.get("method") or "dmc").upper())
    return _LOADING.format(base=_base(config) or "the model that this is for", cache=cache)


def _fill_in(path: Path, config: Mapping, card: Card) -> None:
    if path.is_symlink() or not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    if _PLACEHOLDER in text:
        whole = text.replace(_PLACEHOLDER, loading(config, card), 1)
        path.write_text(whole, encoding="utf-8", errors="surrogateescape")


def _base(config: Mapping) -> str | None:
    """Name of the base model, if it is one of the Hub's: where somebody keeps it is nobody's business."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not os.path.isdir(name) else None
