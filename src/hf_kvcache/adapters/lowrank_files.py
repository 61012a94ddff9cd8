"""The files of a low-rank adapter: `peft_type` "KV_LOWRANK", ranks per layer, and `Basis` tensors per layer and side.

Tensors are called `<attention>.kv_lowrank.kv_lowrank_<side>_<down | up | mean>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import Place
from hf_kvcache.adapters.kinds import Kind, is_a, is_count, or_none
from hf_kvcache.adapters.modules import CHILD, full_attentions, is_attention
from hf_kvcache.codecs.basis import Basis

SIDES = ("k", "v")
PARTS = ("down", "up", "mean")

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def shapes_of(config: Mapping, side: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one side of one layer, by part."""
    s, head_dim = config[f"group_size_{side}"], config["head_dim"]
    n_groups = config["n_kv_heads"] // s
    found = {"down": (n_groups, s * head_dim, rank), "up": (n_groups, s, rank, head_dim)}
    return found | ({"mean": (n_groups, s * head_dim)} if config[f"has_mean_{side}"] else {})


class LowRankKind(Kind):
    """Bases of keys and values, of which no forward pass of the model knows."""

    peft_type = "KV_LOWRANK"
    title = "a low-rank KV adapter"
    child = CHILD
    parts = tuple(f"{side}_{part}" for side in SIDES for part in PARTS)
    config_name = "LowRankKVConfig"
    is_trained = False
    taken = "has bases"
    card = (
        "Low-rank bases of keys and values: a cache stores latents (Palu, arXiv 2407.21118)",
        "low-rank",
        "cache = kv.LowRankCache()  # finds the bases",
    )
    fields = {
        "n_kv_heads": is_count,
        "head_dim": is_count,
        "rope": lambda value: value in ("pre", "post"),
        **{f"group_size_{side}": is_count for side in SIDES},
        **{f"has_mean_{side}": is_a(bool) for side in SIDES},
        **{f"ranks_{side}": is_a(list) for side in SIDES},
        "budget": or_none(is_a(dict)),
        "cache_kwargs": or_none(is_a(dict)),
        "cache_class": or_none(lambda value: isinstance(value, str) and _IDENTIFIER.fullmatch(value)),
    }

    def check_further(self, config, where):
        def refuse(name):
            raise AdapterError(f"{where}: {name}={config[name]!r} is damaged or missing")

        for side in SIDES:
            group_size = config[f"group_size_{side}"]
            if config["n_kv_heads"] % group_size:
                refuse(f"group_size_{side}")
            width = group_size * config["head_dim"]
            if not all(r is None or (is_count(r) and r <= width) for r in config[f"ranks_{side}"]):
                refuse(f"ranks_{side}")
        if len(config["ranks_k"]) != len(config["ranks_v"]):
            raise AdapterError(f"{where}: ranks_k and ranks_v are of different numbers of layers")
        if not self.layers(config):
            raise AdapterError(f"{where} has neither ranks_k nor ranks_v")

    def layers(self, config):
        ranks = enumerate(zip(config["ranks_k"], config["ranks_v"]))
        return [i for i, pair in ranks if pair != (None, None)]

    def shapes(self, config):
        return {
            (layer_idx, f"{side}_{part}"): shape
            for side in SIDES
            for layer_idx, rank in enumerate(config[f"ranks_{side}"])
            if rank is not None
            for part, shape in shapes_of(config, side, rank).items()
        }

    def spoken(self, layer_idx, part):
        side, part = part.split("_")
        return f"{part} tensor of the {'keys' if side == 'k' else 'values'} of layer {layer_idx}"

    def settings(self, config):
        return config["rope"]

    def sizes(self, config, attention):
        yield "KV heads", config["n_kv_heads"], attention.n_kv_heads
        yield "head size", config["head_dim"], attention.head_dim

    def misfits(self, config, model, found):
        if is_attention(model):
            return []
        layers = sorted(set(self.layers(config)) - full_attentions(model).keys())
        return [f"layers {layers} are not plain full attention, whose rows alone are compressed"] if layers else []


LOWRANK = LowRankKind()


def assemble(tensors: Mapping[Place, torch.Tensor]) -> dict[int, dict[str, Basis]]:
    """Bases by layer and side, from tensors by layer and part."""
    parts: dict[int, dict[str, dict]] = {}
    for (layer_idx, name), t in sorted(tensors.items(), key=lambda item: item[0]):
        side, part = name.split("_")
        parts.setdefault(layer_idx, {}).setdefault(side, {})[part] = t
    return {i: {side: Basis(**own) for side, own in sides.items()} for i, sides in parts.items()}
