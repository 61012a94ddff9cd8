"""The files of a low-rank adapter: `peft_type` "KV_LOWRANK", ranks per layer, and `Basis` tensors per layer and side.

Tensors are called `<attention>.kv_lowrank.kv_lowrank_<side>_<down | up | mean>`; `files` reads and writes them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from hf_kvcache.adapters import files
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import is_count, is_fingerprint
from hf_kvcache.adapters.modules import CHILD
from hf_kvcache.codecs.basis import Basis

FORMAT_VERSION = 1
PEFT_TYPE = "KV_LOWRANK"
SIDES = ("k", "v")
PARTS = ("down", "up", "mean")

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def shapes(config: dict, side: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one side of one layer, by part."""
    s, head_dim = config[f"group_size_{side}"], config["head_dim"]
    n_groups = config["n_kv_heads"] // s
    found = {"down": (n_groups, s * head_dim, rank), "up": (n_groups, s, rank, head_dim)}
    return found | ({"mean": (n_groups, s * head_dim)} if config[f"has_mean_{side}"] else {})


def check_config(config: dict, where: str) -> None:
    """Raise `AdapterError` unless a config says what an adapter must say, and nothing impossible."""

    def refuse(name):
        raise AdapterError(f"{where}: {name}={config.get(name)!r} is damaged or missing")

    for name in ("n_kv_heads", "head_dim", "group_size_k", "group_size_v"):
        if not is_count(config.get(name)):
            refuse(name)
    if config.get("rope") not in ("pre", "post"):
        refuse("rope")
    for side in SIDES:
        if not isinstance(config.get(f"has_mean_{side}"), bool):
            refuse(f"has_mean_{side}")
        group_size = config[f"group_size_{side}"]
        if config["n_kv_heads"] % group_size:
            refuse(f"group_size_{side}")
        ranks, width = config.get(f"ranks_{side}"), group_size * config["head_dim"]
        if not isinstance(ranks, list) or not all(r is None or (is_count(r) and r <= width) for r in ranks):
            refuse(f"ranks_{side}")
    if len(config["ranks_k"]) != len(config["ranks_v"]):
        raise AdapterError(f"{where}: ranks_k and ranks_v are of different numbers of layers")
    if not is_fingerprint(config.get("fingerprint")):
        refuse("fingerprint")
    for name in ("budget", "cache_kwargs"):
        if not isinstance(config.get(name), dict | None):
            refuse(name)
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        refuse("base_model_name_or_path")
    cache_class = config.get("cache_class")
    if cache_class is not None and not (isinstance(cache_class, str) and _IDENTIFIER.fullmatch(cache_class)):
        refuse("cache_class")


def _all_shapes(config: dict) -> dict[files.Place, tuple[int, ...]]:
    return {
        (layer_idx, f"{side}_{part}"): shape
        for side in SIDES
        for layer_idx, rank in enumerate(config[f"ranks_{side}"])
        if rank is not None
        for part, shape in shapes(config, side, rank).items()
    }


def _spoken(layer_idx: int, part: str) -> str:
    side, part = part.split("_")
    return f"{part} tensor of the {'keys' if side == 'k' else 'values'} of layer {layer_idx}"


FORMAT = files.Format(
    peft_type=PEFT_TYPE,
    title="a low-rank KV adapter",
    child=CHILD,
    parts=tuple(f"{side}_{part}" for side in SIDES for part in PARTS),
    check=check_config,
    shapes=_all_shapes,
    spoken=_spoken,
    version=FORMAT_VERSION,
)


def write(directory: str | os.PathLike, config: dict, bases: dict[int, dict[str, Basis]], paths: dict) -> Path:
    """`Format.write` for bases by layer and side."""
    return FORMAT.write(directory, config, flat(bases), paths)


def read(source: str | os.PathLike, **hub) -> tuple[dict, dict[int, dict[str, Basis]]]:
    """`Format.read` with bases by layer and side."""
    config, tensors = FORMAT.read(source, **hub)
    return config, assemble({(layer_idx, *part.split("_")): t for (layer_idx, part), t in tensors.items()})


def flat(bases: dict[int, dict[str, Basis]]) -> dict[files.Place, torch.Tensor]:
    """The tensors of bases by layer and side, by layer and part."""
    return {
        (layer_idx, f"{side}_{part}"): t
        for layer_idx, sides in bases.items()
        for side, basis in sides.items()
        for part, t in basis.tensors.items()
    }


def assemble(tensors: dict[tuple[int, str, str], torch.Tensor]) -> dict[int, dict[str, Basis]]:
    """Bases by layer and side, from tensors by layer, side and part."""
    parts: dict[int, dict[str, dict]] = {}
    for (layer_idx, side, part), t in sorted(tensors.items(), key=lambda item: item[0]):
        parts.setdefault(layer_idx, {}).setdefault(side, {})[part] = t
    return {i: {side: Basis(**own) for side, own in sides.items()} for i, sides in parts.items()}
