"""Fit the decisions of a model that drops tokens (DMS, arXiv 2506.05345) to what was recorded of it, without a step.

    python -m hf_kvcache.trainers.fit_decisions --model smollm2 --recordings RECORDED --ratio 4 --window 64 --out dms-4x

`RECORDED` is a folder that `train_retaining_heads --recorded N` has written: features of tokens, and what later text
looked at. Of every prompt and KV head the `1 / ratio` of the tokens that were looked at most are to stay. Decisions are
linear in what the layer reads, so that least squares find them in one pass (as KVzap, arXiv 2601.07891, regresses
KVzip's scores); their level is set so that `1 - 1 / ratio` of the tokens of the last prompts go. The output is an
adapter; `train_dmc --model ADAPTER` trains it on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from hf_kvcache.adapters import save_adapter
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.adapters.projections import has_norms, sources
from hf_kvcache.dmc import Settings
from hf_kvcache.dmc.retrofitting import retrofit
from hf_kvcache.models import resolve
from hf_kvcache.trainers.common import Models, parser_of

RIDGE = 1e-3  # of the mean variance of a feature


@dataclass
class Fit(Models):
    """What decisions are fitted to."""

    _argument_group_name: ClassVar[str] = "decisions"
    recordings: Path = HfArg(default=Path("recorded"), help="folder of recorded prompts")
    target: Literal["answer_max", "answer_weight", "causal", "reconstruction"] = HfArg(
        default="answer_weight", help="what says which tokens are looked at"
    )
    ratio: float = HfArg(default=4.0, help="tokens per row that stays, those of the window not counted")
    window: int = HfArg(default=64, help="tokens that a dropped one stays visible for")
    scale: float = HfArg(default=10.0, help="of decision logits; matters when training goes on")
    valid_prompts: int = HfArg(default=6, help="last prompts, which set the level and are reported on")


def main(args: list[str] | None = None) -> dict:
    """Fit and save; returns what `training.json` says."""
    (options,) = parser_of(__doc__, Fit).parse_args_into_dataclasses(args)
    files = sorted(options.recordings.glob("*.safetensors"))
    if options.ratio <= 1:
        raise ValueError(f"--ratio {options.ratio:g} drops nothing; it must be above 1")
    if not 1 <= options.valid_prompts < len(files):
        raise ValueError(
            f"{options.recordings} has {len(files)} recorded prompts, of which --valid-prompts {options.valid_prompts} "
            "are held out: record more with train_retaining_heads --recorded"
        )
    model = AutoModelForCausalLM.from_pretrained(resolve(options.model), dtype=torch.float32)
    found = attentions(model)
    for attention in found.values():
        if has_norms(attention.module) or any(p.bias is not None for p in projections(attention.module)):
            raise ValueError(
                "this model normalises queries and keys, or adds biases: what was recorded is not linear in what a "
                "layer reads; train decisions with train_dmc"
            )
    settings = Settings("dms", decision="linear", window=options.window, scale=options.scale)
    train, held_out = files[: -options.valid_prompts], files[-options.valid_prompts :]
    children, dropped, same = retrofit(model, settings), [], []
    for i, child in children.items():
        w, one = fit([read(file, i, options) for file in train])
        x, labels = (torch.cat(parts) for parts in zip(*(read(file, i, options) for file in held_out), strict=True))
        level = quantile_level(x @ w, x @ one, 1 - 1 / options.ratio, settings.offset / settings.scale)
        w = w + one[:, None] * level
        is_dropped = x @ w > settings.offset / settings.scale
        dropped.append(is_dropped.float().mean())
        same.append((~is_dropped & (labels < 0)).sum() / (labels < 0).sum())
        with torch.no_grad():
            child.decision.copy_(w.T @ projection(found[i].module))
    report = {
        "ratio": round(1 / (1 - torch.stack(dropped).mean().item()), 3),
        "target": options.ratio,
        "kept of those to be kept": round(torch.stack(same).mean().item(), 4),
        "prompts": len(train),
    }
    tokens = sum(read(file, next(iter(children)), options)[0].shape[0] for file in train)
    save_adapter(model, options.out, target_ratio=options.ratio, achieved_ratio=report["ratio"], tokens_seen=tokens)
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return report


def projections(module: torch.nn.Module) -> list[torch.nn.Module]:
    """What gives the features of an attention module, in their order."""
    return [getattr(module, name) for name in sources(module, "projection").values()]


def projection(module: torch.nn.Module) -> torch.Tensor:
    """The weight that makes features of what an attention module reads, `[F, hidden]`."""
    return torch.cat([p.weight.detach().float() for p in projections(module)])


def read(file: Path, layer: int, options: Fit) -> tuple[torch.Tensor, torch.Tensor]:
    """What decides of all tokens but the last, and what is right.

    Returns:
        Features of the token after each, float32 `[T - 1, F]`: it is the next token that drops one. Labels `[T - 1,
        Hkv]`, 1 where it is to go, and where it is to stay a negative number with which their mean is 0.
    """
    with safe_open(file, "pt") as tensors:
        x = tensors.get_tensor(f"features.{layer}")[1:].float()
        scores = tensors.get_tensor(f"{options.target}.{layer}")[:, :-1].float()  # [Hkv, T - 1]
    n = max(int(scores.shape[1] / options.ratio), 1)
    is_kept = scores >= scores.topk(n, -1).values[:, -1:]
    return x, torch.where(is_kept, 1 - options.ratio, 1.0).T


def fit(prompts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares without a constant: weights `[F, Hkv]`, and `[F]` of what comes nearest to a constant."""
    n_features = prompts[0][0].shape[1]
    gram, right = torch.zeros(n_features, n_features), 0.0
    for x, labels in prompts:
        gram += x.T @ x
        right = right + x.T @ torch.cat([labels, torch.ones(len(x), 1)], 1)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(n_features)
    solved = torch.linalg.solve(gram, right)
    return solved[:, :-1], solved[:, -1]


def quantile_level(scores: torch.Tensor, one: torch.Tensor, share: float, threshold: float) -> torch.Tensor:
    """What to add of `one` `[N]` to scores `[N, Hkv]` so that `share` of them lie above the threshold: `[Hkv]`."""
    low, high = scores.new_full(scores.shape[1:], -10.0), scores.new_full(scores.shape[1:], 10.0)
    for _ in range(40):
        middle = (low + high) / 2
        is_few = (scores + one[:, None] * middle > threshold).float().mean(0) < share
        low, high = torch.where(is_few, middle, low), torch.where(is_few, high, middle)
    return high


if __name__ == "__main__":
    main()
