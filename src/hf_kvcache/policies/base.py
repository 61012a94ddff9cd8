"""What a policy must offer: which tokens stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from hf_kvcache import former_names
from hf_kvcache.former_names import Former
from hf_kvcache.shards import WHOLE, Shard
from hf_kvcache.stores.uniform import PACK_STEP


@dataclass
class Policy:
    """Keep the best-scored tokens of every head within a budget. A subclass is its `score`.

    Attributes:
        budget: tokens to keep per head, as a count.
        ratio: or as a share of the tokens seen, `0 < ratio <= 1`.
        n_sink: oldest tokens that always stay (StreamingLLM, arXiv 2309.17453: they take the softmax's surplus).
        n_recent: newest tokens that always stay.
        decode: whether to evict while decoding too, or only after the prompt.
        interval: tokens by which a decoding layer may overshoot its budget before it evicts, so that eviction
            moves the kept rows once per `interval` tokens.

    Class attributes:
        needs: what it takes from the model: "model" (its `for_model` is called with the layer's `LayerContext`).
        n_queries: newest queries of the layer that `score` reads as `view.queries(n)`.
        state: per-row tensors that follow the rows through eviction and beams, name -> dtype; zero for new rows.
        wants_queries: whether `on_queries` wants the queries of every call.
        is_ragged: whether heads may keep different numbers of rows.
        takes_budget: "yes", "no", or "maybe" where a budget is only an upper bound.
        merges_evicted: whether `merge_evicted` changes rows, which have to be dense for that.
        defer_prefill_eviction: whether a prompt is evicted from only once its next chunk, or the first decoding step,
            has come.
        reads_twice: whether a prompt is read a second time before it is evicted from, see `second_pass`.
        sets_layer_budgets: whether it shares out its budget among layers, which then have none of their own.
        is_trained: whether a retrofitted model says what stays, see `TrainedEviction`.
        shard: which of the model's KV heads are seen, see `for_model`.
        rope: the rotary embedding by which a bound policy rotates queries, or None.
    """

    budget: int | None = None
    ratio: float | None = None
    n_sink: int = 4
    n_recent: int = 32
    decode: bool = True
    interval: int = 32

    needs: ClassVar[frozenset[str]] = frozenset()
    n_queries: ClassVar[int] = 0
    state: ClassVar[dict[str, torch.dtype]] = {}
    wants_queries: ClassVar[bool] = False
    is_ragged: ClassVar[bool] = False
    takes_budget: ClassVar[str] = "yes"
    merges_evicted: ClassVar[bool] = False
    defer_prefill_eviction: ClassVar[bool] = False
    reads_twice: ClassVar[bool] = False
    sets_layer_budgets: ClassVar[bool] = False
    is_trained: ClassVar[bool] = False
    shard: ClassVar[Shard] = WHOLE
    rope: ClassVar[object] = None

    worth, is_due = Former("masked_scores"), Former("should_evict")

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        former_names.take_over(cls, former_names.POLICY)

    def __post_init__(self):
        name = type(self).__name__
        n_given = (self.budget is not None) + (self.ratio is not None)
        if self.takes_budget == "no" and n_given:
            raise ValueError(f"{name} finds out for itself how much to keep: it takes neither budget= nor ratio=")
        if n_given > 1 or (self.takes_budget == "yes" and not n_given):
            raise ValueError(f"{name}: give either budget= (tokens) or ratio= (share of the tokens seen)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"{name}: ratio={self.ratio} is not in (0, 1]")
        if self.budget is not None and self.budget < self.n_sink + self.n_recent:
            raise ValueError(
                f"{name}: budget={self.budget} leaves nothing to choose; it must be at least "
                f"n_sink + n_recent = {self.n_sink} + {self.n_recent}"
            )
        if min(self.n_sink, self.n_recent) < 0 or self.interval < 1:
            raise ValueError(f"{name}: n_sink and n_recent must not be negative, interval must be at least 1")

    # -- what the cache asks before there are rows -------------------------------------------------------------------

    def layer_type(self) -> type | None:
        """The class of layers that this policy needs; None for the usual one."""

    def store_type(self) -> type | None:
        """The class of stores that this policy needs; None for one in which all heads keep the same number of rows."""

    def check_cache(self, cache) -> None:
        """Refuse the options of a cache that this policy does not go with.

        Raises:
            ValueError: there are some; the message names both.
        """
        if self.merges_evicted and cache.all_codecs:
            raise ValueError(
                f"{type(self).__name__} changes rows that stay, which {cache.all_codecs[0]} has packed; use it without "
                "a codec"
            )

    def check_codec(self, codec, cache) -> None:
        """Refuse a codec of one side that cannot encode what this policy leaves.

        Raises:
            ValueError: it cannot; the message names both.
        """
        name = type(self).__name__
        if codec.shares_rows:
            raise ValueError(f"{name} drops tokens head by head, but {codec} shares rows among heads; use group_size=1")
        if codec.granularity > 1:
            raise ValueError(
                f"{name} drops single tokens, but {codec} packs {codec.granularity} tokens "
                'together; use a row-granular codec, such as Quantize(axis="token")'
            )
        if self.budget is None:
            return
        if cache.min_length > self.budget:
            raise ValueError(
                f"{name}: budget={self.budget} is below min_length={cache.min_length}, so nothing would ever be packed"
            )
        n_dense = cache.n_sink + cache.window + PACK_STEP
        if self.budget < n_dense + self.n_sink:
            raise ValueError(
                f"{name}: budget={self.budget} leaves no room for packed rows beside up "
                f"to {n_dense} dense ones (n_sink={cache.n_sink} + window={cache.window} + {PACK_STEP} waiting) and "
                f"its {self.n_sink} sinks; raise budget or lower window"
            )

    def check_states(self) -> None:
        """Raise ValueError where this policy does not go with layers that have linear attention beside rows."""

    def second_pass(self, decoder, input_ids, cache, attention_mask=None, request=None) -> None:
        """Read a prompt again, evict: called by `prefill` where the policy `reads_twice`.

        Args:
            decoder: the model without its head.
            input_ids, attention_mask: `[B, T]`, all that the cache has seen.
            request: ids `[n]` that say what to do.
        """

    def check_recording(self) -> None:
        """Raise ValueError where rows cannot wait for speculative decoding to say which tokens stay."""

    # -- what a layer asks -------------------------------------------------------------------------------------------

    def for_model(self, context) -> Policy:
        """This policy with what it takes from the model, by a `LayerContext`, filled in: one layer's copy."""
        if "model" not in self.needs:
            return self
        bound = copy.copy(self)
        bound.shard = context.shard
        return bound

    def tokens_to_keep(self, tokens_seen: int) -> int:
        """The budget in tokens after `tokens_seen` tokens; all of them where there is none."""
        if self.budget is not None:
            return self.budget
        if self.ratio is None:
            return tokens_seen
        return max(int(self.ratio * tokens_seen), self.n_sink + self.n_recent)

    def should_evict(self, n_kept: int, tokens_seen: int, decoding: bool, n_since: int) -> bool:
        """Whether this step has to evict.

        Args:
            n_kept: rows kept per head (the largest where heads differ).
            tokens_seen: tokens the layer has seen.
            decoding: whether this call was a decoding step.
            n_since: tokens since the last eviction.
        """
        if decoding and not self.decode:
            return False
        return n_kept >= self.tokens_to_keep(tokens_seen) + (self.interval if decoding else 1)

    def on_forward(self, view) -> None:
        """Take note of new rows while the call lasts: `view.module` is the attention module that made them."""

    def on_queries(self, q: torch.Tensor, view) -> None:
        """Take note of queries, before rows are scored: for policies that go by all queries (`wants_queries`).

        Args:
            q: queries of a call after RoPE, `[B, Hq, S, D]`: its last ones are the newest tokens. Rejected drafts are
                not among them.
            view: the `KVView` of the layer. `view.state(name)` and `view.set_state` reach the per-row state,
                `view.layer_state` and `view.set_layer_state` what the layer remembers beside its rows.
        """

    def score(self, view) -> torch.Tensor:
        """Worth of every kept row, `[B, Hkv, N]` in view order; higher stays. Scores of padding do not matter."""
        raise NotImplementedError

    def masked_scores(self, scores: torch.Tensor, positions: torch.Tensor, tokens_seen: int) -> torch.Tensor:
        """Scores in float32, `inf` for sinks and recent tokens, `-inf` for padding, `[B, Hkv, N]`."""
        is_real = positions >= 0
        masked = scores.float().nan_to_num(0.0).masked_fill(~is_real, float("-inf"))
        return masked.masked_fill(self.is_protected(positions, tokens_seen), float("inf"))

    def is_protected(self, positions: torch.Tensor, tokens_seen: int) -> torch.Tensor:
        """The sinks of every row, which stand behind its padding, and the recent tokens; boolean `[B, Hkv, N]`."""
        is_real = positions >= 0
        first = torch.where(is_real, positions, tokens_seen).amin(-1, keepdim=True)
        return is_real & ((positions < first + self.n_sink) | (positions >= tokens_seen - self.n_recent))

    def select(
        self, scores: torch.Tensor, positions: torch.Tensor, tokens_seen: int, n_fixed: int, is_final: bool = True
    ) -> torch.Tensor:
        """Rows that stay: ascending in view order, `[B, Hkv, n]`; for a ragged policy boolean `[B, Hkv, N]`.

        Args:
            scores: from `score`, `[B, Hkv, N]`.
            positions: logical positions, -1 for padding, `[B, Hkv, N]`.
            tokens_seen: tokens the layer has seen.
            n_fixed: rows at the end of the view that cannot go (the dense window over packed rows).
            is_final: whether the prompt is complete, as far as is known.
        """
        masked = self.masked_scores(scores, positions, tokens_seen)
        return topk_indices(masked, max(self.tokens_to_keep(tokens_seen) - n_fixed, 0), n_fixed)

    def merge_evicted(self, view, kept: torch.Tensor) -> None:
        """Let rows that stay take over something of those that go, before they go; `kept` is what `select` chose."""

    def spec(self) -> dict:
        """JSON-able description, read back by `policy_from_spec`."""
        knobs = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        nested = {name: value.spec() for name, value in knobs.items() if isinstance(value, Policy)}
        return {"policy": type(self).__name__} | knobs | nested


def topk_indices(masked: torch.Tensor, n_keep: int, n_fixed: int) -> torch.Tensor:
    """The `n_keep` rows of the largest scores before the last `n_fixed`, and those: ascending `[B, Hkv, n]`."""
    n_free = masked.shape[-1] - n_fixed
    kept = masked[..., :n_free].topk(min(n_keep, n_free), dim=-1, sorted=False).indices.sort(-1).values
    fixed = torch.arange(n_free, masked.shape[-1], device=kept.device).expand(*kept.shape[:2], n_fixed)
    return torch.cat([kept, fixed], -1)


def policy_from_spec(spec: dict | None) -> Policy | None:
    """The policy that `spec()` described."""
    if spec is None:
        return None
    kinds = {kind.__name__: kind for kind in _subclasses(Policy)}
    if spec.get("policy") not in kinds:
        raise ValueError(f"no policy is called {spec.get('policy')!r}")
    knobs = {k: policy_from_spec(v) if _is_spec(v) else v for k, v in spec.items() if k != "policy"}
    return kinds[spec["policy"]](**knobs)


def _is_spec(value) -> bool:
    return isinstance(value, dict) and "policy" in value


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(sub) for sub in kind.__subclasses__()))
