r"""Give a model fewer KV heads, each the mean of some of its own: grouped-query attention (arXiv 2305.13245).

    python -m hf_kvcache.trainers.convert_gqa --model ID_OR_PATH --kv-heads 4 --out model-gqa
    python -m hf_kvcache.trainers.convert_gqa --kv-heads 1 --uptrain-steps 560 --data books/train --out small-mqa

A smaller cache at a fixed ratio, and with it the baseline of methods that decide for themselves (arXiv 2305.13245,
"mean pooling"). Models need training afterwards: `--uptrain-steps` runs the control run of `train_dmc` on the result,
whose arguments (`--lr`, `--data`, `--sequence`, `--bf16`, ...) go behind ours.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg

from hf_kvcache.adapters.modules import CHILDREN, attentions
from hf_kvcache.models import embedded_model, resolve
from hf_kvcache.trainers import train_dmc
from hf_kvcache.trainers.common import parser_of


@dataclass
class Conversion:
    """What to convert."""

    _argument_group_name: ClassVar[str] = "conversion"
    kv_heads: int = HfArg(help="KV heads that are left, a divisor of those there are")
    out: Path = HfArg(help="folder for the model")
    model: str = HfArg(default=str(embedded_model()), help="name or path; the embedded model unless given")
    uptrain_steps: int = HfArg(default=0, help="steps of training on what is left; 0 for none")


def pool_heads(model: nn.Module, n_kv_heads: int) -> nn.Module:
    """A copy of a model with fewer KV heads: projections of heads that will share one are averaged.

    Neighbours are pooled, so that query heads stay where they are.

    Args:
        model: every attention module has `k_proj` and `v_proj`, plain linear layers, with biases or without.
        n_kv_heads: a divisor of the KV heads that it has.

    Raises:
        ValueError: it cannot be converted.
    """
    found = attentions(model)
    check(model, found, n_kv_heads)
    model = copy.deepcopy(model)
    for attention in attentions(model).values():
        module, D = attention.module, attention.head_dim
        for name in ("k_proj", "v_proj"):
            setattr(module, name, _pooled(getattr(module, name), n_kv_heads, D))
        module.num_key_value_groups = attention.n_heads // n_kv_heads
        for count in ("num_key_value_heads", "num_kv_heads"):
            if hasattr(module, count):
                setattr(module, count, n_kv_heads)
        # modules may share the config, or have their own
        module.config.num_key_value_heads = n_kv_heads
    model.config.get_text_config(decoder=True).num_key_value_heads = n_kv_heads
    return model


def check(model: nn.Module, found: dict, n_kv_heads: int) -> None:
    """Raise `ValueError` for what `pool_heads` cannot convert."""
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention modules that could be converted")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_key_value_heads", None) is None:
        raise ValueError(f"the config of {type(model).__name__} does not say how many KV heads there are")
    for i, attention in found.items():
        module, H = attention.module, attention.n_kv_heads
        if n_kv_heads < 1 or H % n_kv_heads:
            raise ValueError(f"layer {i} has {H} KV heads, which {n_kv_heads} do not divide")
        if any(getattr(module, name, None) is not None for name in CHILDREN):
            raise ValueError(f"layer {i} carries an adapter made for {H} KV heads; convert the bare model")
        for name in ("k_proj", "v_proj"):
            projection = getattr(module, name, None)
            if type(projection) is not nn.Linear:
                kind = "no" if projection is None else f"a {type(projection).__name__} as"
                raise ValueError(f"layer {i} has {kind} {name}; only separate, plain linear layers can be pooled")
            if projection.out_features != H * attention.head_dim:
                raise ValueError(f"layer {i}: {name} makes {projection.out_features} channels for {H} KV heads")
        norm = getattr(getattr(module, "k_norm", None), "weight", None)
        if norm is not None and norm.numel() != attention.head_dim:
            raise ValueError(f"layer {i}: k_norm has weights per head, which cannot be pooled")


@torch.no_grad()
def _pooled(projection: nn.Linear, n_heads: int, head_dim: int) -> nn.Linear:
    """Means over neighbouring heads."""
    mean = {
        name: t.float().unflatten(0, (n_heads, -1, head_dim)).mean(1).flatten(0, 1).to(t.dtype)
        for name, t in projection.named_parameters()
    }
    new = nn.Linear(projection.in_features, n_heads * head_dim, bias="bias" in mean, device="meta")
    for name, t in mean.items():
        setattr(new, name, nn.Parameter(t, requires_grad=getattr(projection, name).requires_grad))
    return new.train(projection.training)


def main(args: list[str] | None = None) -> None:
    """Convert, save, and train if asked to."""
    parser = parser_of(__doc__, Conversion)
    conversion, further = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if further and not conversion.uptrain_steps:
        parser.error(f"{' '.join(further)}: arguments of training, which needs --uptrain-steps")
    steps = ["--zero-steps", "0", "--ramp-steps", str(conversion.uptrain_steps - conversion.uptrain_steps // 5)]
    steps += ["--solid-steps", str(conversion.uptrain_steps // 5)]

    source = resolve(conversion.model)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    before = next(iter(attentions(model).values()), None)
    model = pool_heads(model, conversion.kv_heads)
    model.save_pretrained(conversion.out)
    AutoTokenizer.from_pretrained(source).save_pretrained(conversion.out)
    print(json.dumps({"kv_heads": conversion.kv_heads, "before": before.n_kv_heads, "out": str(conversion.out)}))

    if conversion.uptrain_steps:
        folders = ["--model", str(conversion.out), "--out", str(conversion.out)]
        train_dmc.main(["--method", "none", *folders, *steps, *further])


if __name__ == "__main__":
    main()
