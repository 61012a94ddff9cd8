"""What later queries think of a prompt, layer by layer, taken off a forward pass through the model's own attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, normalize

from hf_kvcache.adapters.modules import attached_heads
from hf_kvcache.calibration.importance import BLOCK, answer_max, attention_mass, causal_max, reconstruction
from hf_kvcache.calibration.observe import Passing, Through
from hf_kvcache.compat import cache_argument
from hf_kvcache.sharded_model import refuse_shards


@dataclass(frozen=True)
class Text:
    """A batch of prompts and of what judges them.

    Rows begin with padding up to a common length of prompts, and end with padding.

    Attributes:
        ids: `[B, N]`.
        is_real: False for padding, `[B, N]`; None when nothing is padded.
        n_prompt: the first columns, which are judged.
        n_judging: the last columns, whose queries judge.
    """

    ids: torch.Tensor
    is_real: torch.Tensor | None
    n_prompt: int
    n_judging: int

    @property
    def prompt(self) -> slice:
        """Columns of the prompts."""
        return slice(self.n_prompt)

    @property
    def judging(self) -> slice:
        """Columns of what judges them."""
        return slice(self.ids.shape[1] - self.n_judging, None)

    def real(self, columns: slice) -> torch.Tensor | None:
        """`is_real` of some columns."""
        return None if self.is_real is None else self.is_real[:, columns]

    def to(self, device) -> Text:
        is_real = None if self.is_real is None else self.is_real.to(device)
        return replace(self, ids=self.ids.to(device), is_real=is_real)


# queries [B, Hq, N, D], keys [B, Hkv, N, D], the attention's scaling, the text -> float32 [B, Hkv, T]
Judge = Callable[[torch.Tensor, torch.Tensor, float, Text], torch.Tensor]


def judge_answer_max(q, k, scaling, text: Text) -> torch.Tensor:
    is_real = {"q_is_real": text.real(text.judging), "k_is_real": text.real(text.prompt)}
    return answer_max(q[:, :, text.judging], k[:, :, text.prompt], scaling, **is_real, block=_block(k))


def judge_causal(q, k, scaling, text: Text) -> torch.Tensor:
    q, k = (rows[:, :, text.prompt] for rows in (q, k))
    return causal_max(q, k, scaling, is_real=text.real(text.prompt), block=_block(k))


def judge_reconstruction(q, k, scaling, text: Text) -> torch.Tensor:
    return reconstruction(q[:, :, text.judging], k, scaling, text.n_prompt, is_real=text.is_real, block=_block(k))


def judge_mass(q, k, scaling, text: Text) -> torch.Tensor:
    """Attention that the judging queries pay to every token of the prompt."""
    return attention_mass(q[:, :, text.judging], k, scaling, text.n_prompt, is_real=text.is_real, block=_block(k))


def judge_keydiff(q, k, scaling, text: Text) -> torch.Tensor:
    """What KeyDiff (arXiv 2504.15364) thinks of a prompt without padding, to compare with."""
    keys = k[:, :, text.prompt].float()
    return -cosine_similarity(keys, normalize(keys, dim=-1).sum(2, keepdim=True), dim=-1)


def _block(k: torch.Tensor) -> tuple[int, int]:
    # what fits into a core's cache: measured, two thirds of the time
    return (128, 256) if k.device.type == "cpu" else BLOCK


TARGETS: dict[str, Judge] = {
    "answer_max": judge_answer_max,
    "answer_weight": judge_reconstruction,
    "causal": judge_causal,
    "reconstruction": judge_reconstruction,
}


class _Judging(Passing):
    """A layer that keeps nothing but what judges say, and what retaining heads would score the prompt by."""

    def __init__(self, layer_idx: int, text: Text, judges: dict[str, Judge]):
        # keys are judged as attention sees them
        super().__init__(layer_idx, rope="post")
        self._text, self._judges = text, judges

    def bind(self, context):
        super().bind(context)
        self._module = context.module

    def compress(self, call):
        keys, scaling = call.view.new_k, call.options.get("scaling")
        scaling = self._module.scaling if scaling is None else scaling
        self.said = {name: judge(call.query, keys, scaling, self._text) for name, judge in self._judges.items()}
        heads = attached_heads(self._module)
        # a copy: the rest of the sequence need not be kept
        self.features = None if heads is None else heads.features()[:, self._text.prompt].clone()
        super().compress(call)


class Judged(NamedTuple):
    """What was seen of the prompts of a text.

    Attributes:
        said: by name of the judge and layer index, float32 `[B, Hkv, T]`.
        features: by layer index, `[B, T, F]`; None for layers without retaining heads.
    """

    said: dict[str, dict[int, torch.Tensor]]
    features: dict[int, torch.Tensor | None]


@torch.no_grad()
def judge(model: torch.nn.Module, text: Text, judges: dict[str, Judge]) -> Judged:
    """Run a text through a causal language model, without its head, and let judges look at every full-attention layer.

    Queries and keys exist one layer at a time; what retaining heads on the model are fed with is kept of all.

    Raises:
        ValueError: several processes share the model.
    """
    refuse_shards(model, "judging tokens")
    cache = Through(_Judging, text, judges)
    masks = {}
    if text.is_real is not None:
        positions = (text.is_real.long().cumsum(-1) - 1).clamp(min=0)
        masks = {"attention_mask": text.is_real.long(), "position_ids": positions}
    model.get_decoder()(input_ids=text.ids, **cache_argument(cache), use_cache=True, **masks)
    layers = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, _Judging)}
    said = {name: {i: layer.said[name] for i, layer in layers.items()} for name in judges}
    return Judged(said, {i: layer.features for i, layer in layers.items()})
