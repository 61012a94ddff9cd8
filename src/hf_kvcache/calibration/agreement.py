"""How well scores say which tokens matter: against true scores, and against the attention that is lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from hf_kvcache.calibration.judging import Judge, judge, judge_keydiff, judge_mass
from hf_kvcache.calibration.prompts import Arrange


def best(scores: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """Which tokens are the `n` best of their head (`[B]`: of every row its own): boolean `[B, H, T]`."""
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return place < (n if isinstance(n, int) else n[:, None, None])


def overlap(predicted: torch.Tensor, target: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """How much of the best `share` of the tokens two scores `[B, H, T]` have in common, in [0, 1]; by chance `share`.

    Tokens whose target is not finite are left out.

    Returns:
        Of every head `[H]`.
    """
    is_real = target.isfinite()
    n = (is_real[:, 0].sum(-1) * share).round().long().clamp(min=1)  # [B]
    both = best(predicted.masked_fill(~is_real, -torch.inf), n) & best(target, n)
    return (both.sum(-1) / n.unsqueeze(1)).mean(0)


def kept_mass(scores: torch.Tensor, mass: torch.Tensor, budget: int) -> torch.Tensor:
    """Share of the attention `mass` `[B, H, T]` that the `budget` best tokens hold.

    Returns:
        Of every head `[H]`.
    """
    return ((mass * best(scores, budget)).sum(-1) / mass.sum(-1)).mean(0)


@torch.no_grad()
def agreement(
    model: torch.nn.Module,
    scores_of: Callable[[dict[int, torch.Tensor]], dict[int, torch.Tensor]],
    target: Judge,
    prompts,
    to_target: Arrange,
    to_answer: Arrange,
    budget: int = 0,
    n_recent: int = 100,
) -> dict[str, float]:
    """How good scores are on prompts: means over layers and heads.

    Args:
        model: has retaining heads attached, which show what heads are fed with.
        scores_of: by layer, `[B, Hkv, T]` from features `[B, T, F]`.
        target: what the scores shall agree with, of texts that `to_target` makes.
        prompts: a sequence of `Prompt`.
        to_answer: makes texts whose answers look at the prompt.
        budget: tokens that are kept; 0 is an eighth of the prompt.
        n_recent: last tokens of the prompt, which are kept beside them.

    Returns:
        `overlap` of the best tenth of the tokens with that of the target (by chance 0.1), and the share of the
        attention of the answer to all but the `n_recent` last tokens that stays when `budget` of these do: chosen by
        the scores ("mass"), by others ("mass_keydiff", "mass_recent", "mass_random"), by the target itself and with
        hindsight, which is the most there is ("mass_target", "mass_most").
    """
    found, random = defaultdict(list), torch.Generator().manual_seed(0)
    for prompt in (prompts[i] for i in range(len(prompts))):
        of_target, of_answer = (arrange([prompt]).to(model.device) for arrange in (to_target, to_answer))
        wanted = judge(model, of_target, {"target": target}).said["target"]
        said, features = judge(model, of_answer, {"mass": judge_mass, "keydiff": judge_keydiff})
        for i, scores in scores_of(features).items():
            found["overlap"].append(overlap(scores, wanted[i]).mean())
            n, mass = scores.shape[-1], said["mass"][i]
            judged = slice(max(n - n_recent, 1))
            rivals = {
                "mass": scores,
                "mass_keydiff": said["keydiff"][i],
                "mass_recent": torch.arange(n, device=mass.device).expand_as(mass),
                "mass_random": torch.rand(mass.shape, generator=random).to(mass.device),
                "mass_target": wanted[i],
                "mass_most": mass,
            }
            for name, by in rivals.items():
                found[name].append(kept_mass(by[..., judged], mass[..., judged], budget or max(n // 8, 1)).mean())
    return {name: round(torch.stack(values).mean().item(), 4) for name, values in found.items()}
