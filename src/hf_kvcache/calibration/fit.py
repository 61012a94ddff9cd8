"""From a model and a text to the bases of its low-rank cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import kl_div, log_softmax

from hf_kvcache.adapters import Bases
from hf_kvcache.adapters.modules import full_attentions
from hf_kvcache.calibration.observe import LayerMoments, logits_behind, observe
from hf_kvcache.calibration.ranks import ALLOCATORS, Side
from hf_kvcache.calibration.weights import WeightGradients, condition_number, projection_weight
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.codecs.fitting import principal
from hf_kvcache.codecs.lowrank import step_of

DIRECTIONS = ("gradient", "rows", "weights")
LEVELS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of the width at which the loss of a side is measured
MEASURED = 4  # batches to measure on unless told
ITEMSIZE = 2  # bytes of a channel for which budgets are made: 16-bit caches
POSITION = 4  # bytes of the position of a token, which keys before RoPE need


def fit_bases(
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    *,
    rank: float = 0.5,
    rope: str = "pre",
    group_size_k: int | str = 1,
    group_size_v: int | str = "all",
    directions: str | tuple[str, str] = "gradient",
    allocator: str = "measured",
    centre: bool = True,
    refine: int = 0,
    n_measured: int = MEASURED,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Bases:
    """Bases and ranks for a model (Palu, arXiv 2407.21118, by the covariance of outputs instead of inputs).

    Args:
        model: causal language model.
        batches: token ids `[B, T]`; gone through once per pass.
        rank: share of the bytes of a dense cache that the latents may take, their positions included; 1 keeps every
            direction.
        rope: project keys before RoPE ("pre") or after it ("post").
        group_size_k, group_size_v: KV heads that share latents, or "all".
        directions: what a direction is worth, a pair sets keys and values apart: "gradient" weighs errors by the
            gradient of the loss, "rows" by nothing (principal components: the whitened SVD of the weights), "weights"
            knows no data (the SVD of the weights).
        allocator: how ranks are shared out, see `calibration.ranks`. "measured": to where a byte saves the most loss,
            as measured on a few texts; "greedy": as estimated from gradients; "uniform", "fisher", "condition".
        centre: subtract the mean row.
        refine: passes that look again through the low-rank model, whose later layers see what earlier ones lost.
        n_measured: batches that "measured" reads for every rank that it tries: four ranks of either side of each layer.
        on_progress: called with what is being done, and how much of how much of it is done.

    Raises:
        ValueError: an argument is out of range, or the budget does not pay for the smallest ranks.
    """
    directions = (directions, directions) if isinstance(directions, str) else directions
    for name in directions:
        if name not in DIRECTIONS:
            raise ValueError(f"directions={name!r} is not one of {', '.join(DIRECTIONS)}")
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator={allocator!r} is not one of {', '.join(ALLOCATORS)}")
    if not 0 < rank <= 1:
        raise ValueError(f"rank={rank} is not a share in (0, 1]")
    if n_measured < 1:
        raise ValueError(f"n_measured={n_measured} must be at least one batch")
    batches = list(batches)
    attentions = {i: attention.module for i, attention in full_attentions(model).items()}
    fisher = WeightGradients(attentions) if allocator == "fisher" else None

    bases = None
    for n in range(refine + 1):
        done = 0

        def after_batch(n=n):
            nonlocal done
            done += 1
            if fisher is not None:
                fisher.add()
            on_progress("looking at rows" if n == 0 else f"looking again, pass {n}", done, len(batches))

        seen = observe(
            model,
            batches,
            rope=rope,
            group_sizes={"k": group_size_k, "v": group_size_v},
            with_gradients="gradient" in directions or allocator in ("measured", "greedy", "fisher"),
            basis_of=None if bases is None else bases.of,
            weights=() if fisher is None else fisher.parameters,
            on_batch=after_batch,
        )
        kinds, needs_weights = dict(zip("kv", directions)), allocator == "condition"
        found, sides, budget = _candidates(model, seen, rank, rope, kinds, centre, fisher, needs_weights)
        if allocator == "measured" and rank < 1:
            few = batches[:: max(len(batches) // n_measured, 1)][:n_measured]
            sides = _measure(model, few, found, sides, rope, on_progress)
        # everything is everything, though positions come on top of it
        whole = {key: side.width for key, side in sides.items()}
        ranks = whole if rank == 1 else ALLOCATORS[allocator](sides, budget)
        layers = {i: {side: found[i, side].truncated(ranks[i, side]) for side in "kv"} for i in seen}
        how = {"rank": rank, "allocator": allocator, "directions": list(directions)}
        bases = Bases(layers, rope=rope, budget=how)
    return bases.made_for(model)


def _candidates(model, seen, rank, rope, directions, centre, fisher, needs_weights):
    """Bases of full rank, what allocators know of them, and the budget in bytes per token."""
    attentions = full_attentions(model)
    found: dict[tuple[int, str], Basis] = {}
    sides: dict[tuple[int, str], Side] = {}
    budget = 0.0
    for i, moments in seen.items():
        attention = attentions[i]
        budget += rank * 2 * attention.n_kv_heads * attention.head_dim * ITEMSIZE - (POSITION if rope == "pre" else 0)
        for side, rows in moments.rows.items():
            found[i, side], saves = _directions(attention, side, moments, directions[side], centre)
            n_groups, width = rows.total.shape
            sides[i, side] = Side(
                layer_idx=i,
                saves=saves.sum(0).cpu(),
                sensitivity=1.0 if fisher is None else fisher.score(i, side),
                condition=condition_number(projection_weight(attention.module, side)) if needs_weights else 1.0,
                cost=lambda r, n_groups=n_groups: float(ITEMSIZE * n_groups * r),
                step=step_of(width),
            )
    return found, sides, budget


@torch.no_grad()
def _measure(model, batches, found, sides, rope, on_progress) -> dict:
    """Sides with the loss of the model, KL to itself, when that side alone is cut to a few ranks."""
    dense = [model(ids.to(model.device), use_cache=False).logits for ids in batches]
    n_tokens = sum(ids.numel() for ids in batches)

    def loss(key, rank):
        alone = {key: found[key].truncated(rank)}
        total = 0.0
        for ids, expected in zip(batches, dense, strict=True):
            logits = logits_behind(model, ids, lambda *where: alone.get(where), rope)
            ours, theirs = (log_softmax(x.float(), -1) for x in (logits, expected))
            total += kl_div(ours, theirs, reduction="sum", log_target=True).item()
        return total / n_tokens

    measured = {}
    for n, (key, side) in enumerate(sides.items(), 1):
        ranks = sorted({side.rounded(share * side.width) for share in LEVELS} - {side.width})
        measured[key] = side.measured({rank: loss(key, rank) for rank in ranks}) if len(ranks) > 1 else side
        on_progress("measuring layers", n, len(sides))
    return measured


def _directions(attention, side: str, moments: LayerMoments, kind: str, centre: bool) -> tuple[Basis, torch.Tensor]:
    """The basis of full rank, and the loss that each of its directions saves `[G, n]`."""
    rows = moments.rows[side]
    n_groups, width = rows.total.shape
    group_size = width // attention.head_dim
    mean, covariance = (rows.mean if centre else None), rows.covariance(centre)
    if kind == "gradient":
        return principal(covariance, group_size, mean, moments.gradients[side].covariance(False))
    # the mean squared gradient turns lost energy into lost likelihood, so that layers can be compared
    weight = _sensitivity(moments, side) if side in moments.gradients else 1.0
    if kind == "rows":
        basis, saves = principal(covariance, group_size, mean)
        return basis, saves * weight
    matrix = projection_weight(attention.module, side).double().unflatten(0, (n_groups, width))
    basis, saves = principal(matrix @ matrix.transpose(1, 2), group_size)
    return basis, saves * weight


def _sensitivity(moments: LayerMoments, side: str) -> float:
    """Mean squared gradient per channel."""
    if side not in moments.gradients:
        return 1.0
    return float(moments.gradients[side].covariance(False).diagonal(dim1=1, dim2=2).mean())
