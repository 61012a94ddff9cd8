"""One-hop recall with filler: a task on which minutes of one CPU core show what a retrofit decides to keep.

A context of worthless fillers and a few pairs, each of which says key and value in one token; then questions. What is
to be done is plain (keep pairs, let fillers go), so the rows that a retrofitted model spends on either are its verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hf_kvcache.adapters.modules import attentions
from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc.layer import TrainedLayer
from hf_kvcache.dmc.objective import hinge, merged_share, ramp
from hf_kvcache.dmc.retrofitting import retrofit, retrofits
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.dmc.training import draw_noise, zero_rows

N_FILLERS, N_KEYS, N_VALUES = 16, 16, 8
CONTEXT, PAIRS, QUESTIONS = 96, 12, 16
# ids of the first pair, question and answer; fillers come before them
PAIR = N_FILLERS
QUESTION = PAIR + N_KEYS * N_VALUES
ANSWER = QUESTION + N_KEYS
VOCABULARY = ANSWER + N_VALUES
TOKENS = CONTEXT + 2 * QUESTIONS
# texts are short: what DMS holds for a window would soon be all that it saves
SETTINGS = {"dmc": Settings("dmc"), "dms": Settings("dms", window=4, scale=20.0)}


def sample(n: int, generator: torch.Generator) -> torch.Tensor:
    """Texts of the task, `[n, TOKENS]`: a context, then questions about it, each followed by its answer."""
    text = torch.randint(N_FILLERS, (n, CONTEXT), generator=generator)
    keys = torch.rand(n, N_KEYS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(N_VALUES, (n, PAIRS), generator=generator)
    places = torch.rand(n, CONTEXT, generator=generator).argsort(-1)[:, :PAIRS]
    text.scatter_(1, places, PAIR + N_VALUES * keys + values)
    asked = torch.randint(PAIRS, (n, QUESTIONS), generator=generator)
    questions, answers = QUESTION + keys.gather(1, asked), ANSWER + values.gather(1, asked)
    return torch.cat([text, torch.stack([questions, answers], -1).flatten(1)], 1)


def build(seed: int) -> nn.Module:
    """The untrained model: two layers of two heads of 32 channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("hf_kvcache")
    return model


@dataclass(frozen=True)
class Plan:
    """How long, and how hard, models are trained.

    Attributes:
        base: steps of the model before any retrofit, at `base_batch` texts each.
        base_rate: peak learning rate of those.
        zero_out, rise, settle: steps of a retrofit without its channel (none where no channel is borrowed), under a
            ratio that rises, and at that ratio, while the learning rate falls.
        batch: texts of each.
        rate: their learning rate.
        weight: of the hinge; with as few heads as here, 1 stays behind the ratio asked for.
    """

    base: int = 400
    base_batch: int = 32
    base_rate: float = 3e-3
    zero_out: int = 20
    rise: int = 150
    settle: int = 120
    batch: int = 16
    rate: float = 2e-3
    weight: float = 3.0


def train_base(plan: Plan, seed: int) -> nn.Module:
    """The model that can do the task with all rows."""
    model, generator = build(seed), torch.Generator().manual_seed(seed)
    rates = _cosine(plan.base, plan.base_rate, 0.05)
    _optimise(model, lambda _: loss(model, sample(plan.base_batch, generator)), rates)
    return model


def train_on(base: nn.Module, plan: Plan, seed: int, ratio: float = 1.0, settings: Settings | None = None) -> nn.Module:
    """A copy of a model, trained as long as a retrofit takes: the control, or, given settings, the retrofit.

    Args:
        base: what to start from.
        plan: steps and rates.
        seed: of texts and noise.
        ratio: tokens per row to ask for.
        settings: of the retrofit, or None.
    """
    model, generator = deepcopy(base), torch.Generator().manual_seed(1000 + seed)
    children = retrofit(model, settings) if settings is not None else {}

    def plain(_: int) -> torch.Tensor:
        return loss(model, sample(plan.batch, generator))

    def fading(step: int) -> torch.Tensor:
        for child in children.values():
            child.fade = max(0.0, 1 - step / (0.8 * plan.zero_out))
        return plain(step)

    def compressing(step: int) -> torch.Tensor:
        draw_noise(model, plan.batch, TOKENS, seed=100_000 * seed + step)
        task = plain(step)
        share = merged_share({i: child.call for i, child in children.items()})
        return task + plan.weight * hinge(share, ramp(step, plan.rise, ratio))

    _compress(children, False)
    _optimise(model, fading, [plan.rate] * plan.zero_out)
    if settings is not None and settings.ablates:
        zero_rows(model)
    _compress(children, True)
    rates = [plan.rate] * plan.rise + _cosine(plan.settle, plan.rate, 0.1)
    _optimise(model, compressing if children else plain, rates)
    return model


def train_pooling(base: nn.Module, plan: Plan, seed: int, size: int = 4) -> nn.Module:
    """A copy of a model, trained as long as a retrofit, whose rows are plain means of `size` neighbours each."""
    model, generator = pool(deepcopy(base), size), torch.Generator().manual_seed(1000 + seed)
    rates = [plan.rate] * (plan.zero_out + plan.rise) + _cosine(plan.settle, plan.rate, 0.1)
    _optimise(model, lambda _: loss(model, sample(plan.batch, generator)), rates)
    return model


def pool(model: nn.Module, size: int) -> nn.Module:
    """Let the rows of a model be plain means of `size` neighbours each (in place), for a `DMCCache`."""
    for i, child in retrofit(model, Settings("dmc", "linear", window=size)).items():
        # weights that stay zero: all members count the same
        child.requires_grad_(False)
        attentions(model)[i].module.register_forward_pre_hook(_Pool(size), with_kwargs=True)
    return model


@dataclass
class _Pool:
    """Hook of an attention module, behind those of its retrofit: decisions by position, whatever the model says."""

    size: int

    def __call__(self, attention: nn.Module, args, kwargs) -> None:
        call = attention.kv_dmc.call
        start = 0 if call.layer is None else call.layer.tokens_seen
        position = torch.arange(start, start + call.alpha.shape[-1], device=call.alpha.device)
        call.alpha = call.p = (position % self.size != 0).expand_as(call.alpha)
        call.left = torch.zeros_like(call.logits).masked_fill(call.alpha, float("-inf"))


def _compress(children: dict, compresses: bool) -> None:
    for child in children.values():
        child.compresses, child.fade = compresses, 0.0


def _cosine(n_steps: int, peak: float, end: float) -> list[float]:
    """Learning rates from `peak` down to the share `end` of it."""
    return [peak * (end + (1 - end) * (1 + math.cos(math.pi * step / n_steps)) / 2) for step in range(n_steps)]


def _optimise(model: nn.Module, objective: Callable[[int], torch.Tensor], rates: list[float]) -> None:
    """One step of AdamW on `objective(step)` at every learning rate."""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    for step, rate in enumerate(rates):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        objective(step).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
    model.eval()


def answers(text: torch.Tensor) -> torch.Tensor:
    """The right ones, `[n, QUESTIONS]`."""
    return text[:, CONTEXT + 1 :: 2]


def logits(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """What a model says to every question of texts it reads at once, `[n, QUESTIONS, VOCABULARY]`."""
    return model.lm_head(model.model(text, use_cache=False).last_hidden_state[:, CONTEXT::2])


def loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answers."""
    return F.cross_entropy(logits(model, text).flatten(0, 1), answers(text).flatten())


@torch.no_grad()
def serve(model: nn.Module, text: torch.Tensor, cache) -> torch.Tensor:
    """Logits as from `logits`, where a cache holds the rows: the context at once, the rest token by token."""
    model(text[:, :CONTEXT], **cache_argument(cache), logits_to_keep=1)
    said = [model(text[:, t : t + 1], **cache_argument(cache)).logits for t in range(CONTEXT, TOKENS)]
    return torch.cat(said[::2], 1)


def accuracy(said: torch.Tensor, text: torch.Tensor) -> float:
    """Share of questions answered right; 1/8 is chance."""
    return (said.argmax(-1) == answers(text)).float().mean().item()


def tokens_per_row(cache) -> float:
    """Compression that is real: tokens over the rows that a cache holds, over all layers and heads."""
    stores = [(layer.store, isinstance(layer, TrainedLayer)) for layer in cache.layers]
    layers = [store.packed.lengths if is_trained else store.n_kept for store, is_trained in stores]
    rows = [torch.as_tensor(n, dtype=torch.float32).mean() for n in layers]
    return cache.get_seq_length() / torch.stack(rows).mean().item()


@dataclass(frozen=True)
class Verdict:
    """What decisions come to on some texts.

    Attributes:
        ratio: tokens per row by decisions alone, as training counts them: what is condemned counts as gone.
        fillers, pairs: share of the fillers and of the pairs that the decisions give a row, `[L, Hkv]`.
    """

    ratio: float
    fillers: torch.Tensor
    pairs: torch.Tensor


@torch.no_grad()
def verdict(model: nn.Module, text: torch.Tensor) -> Verdict:
    """Decisions of a retrofitted model on texts."""
    logits(model, text)
    kept = []
    for child in retrofits(model).values():
        alpha = child.call.alpha
        # DMS speaks of the token before
        kept.append(~(alpha if child.settings.merges else F.pad(alpha[..., 1:], (0, 1))))
    kept = torch.stack(kept).float()  # [L, B, Hkv, TOKENS]
    is_filler, is_pair = text < PAIR, (text >= PAIR) & (text < QUESTION)
    of = [(kept * c.unsqueeze(1)).sum((1, 3)) / c.sum() for c in (is_filler, is_pair)]
    return Verdict(1 / kept.mean().item(), *of)
