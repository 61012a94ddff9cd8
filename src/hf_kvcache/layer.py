"""One attention layer of the cache: rows are appended, attention reads them, then the layer compresses."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_kvcache.codecs.fitted import refit
from hf_kvcache.layer_contract import LayerContract
from hf_kvcache.row_shapes import check_rows, prepare_codecs
from hf_kvcache.stores.uniform import UniformStore
from hf_kvcache.view import KVView

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec
    from hf_kvcache.layer_context import LayerContext
    from hf_kvcache.policies.base import Policy
    from hf_kvcache.rope import Rope


class KVLayer(LayerContract):
    """Rows of one layer: `append` in `update`, `prepare` before attention, `compress` after it.

    Args:
        layer_idx: index of the layer in the model.
        keys, values: codecs, or None to stay dense.
        policy: which tokens stay, or None for all.
        window, n_sink, min_length, max_length: see `UniformStore`.
        exact_prefill, rerotate_keys: see `KVCache`.

    Attributes:
        tokens_seen: tokens appended so far; the store says how many rows are kept of them.
        met: a weak reference to the attention module that reads this text, once it has.
        attend: a method that attends to the rows (`AttentionCall` to what attention returns), for layers with an
            attention of their own.
    """

    has_states = False  # of linear attention
    attend = None

    def __init__(
        self,
        layer_idx: int = 0,
        keys: Codec | None = None,
        values: Codec | None = None,
        policy: Policy | None = None,
        *,
        window: int = 64,
        n_sink: int = 0,
        min_length: int = 0,
        max_length: int | None = None,
        exact_prefill: bool = True,
        rerotate_keys: bool = False,
    ):
        # not the base class's, which would hold tensors of its own
        self.is_initialized = False
        self.layer_idx, self.policy = layer_idx, policy
        self.exact_prefill, self.rerotate_keys = exact_prefill, rerotate_keys
        sizes = dict(window=window, n_sink=n_sink, min_length=min_length, max_length=max_length)
        self.store = self._make_store(keys, values, **sizes)
        self._codecs, self.policy_at_reset = (self.store.keys, self.store.values), policy
        self.record_past = False
        self._forget()

    def _make_store(self, keys: Codec | None, values: Codec | None, **sizes) -> UniformStore:
        policy, kind = self.policy, None
        tracked = {} if policy is None else {"position": torch.int32, **policy.state}
        # where in RoPE a key is, as far as it is not where the token is in the text
        tracked |= {"angle": torch.int32} if self.rerotate_keys else {}
        for part in (policy, keys):
            kind = kind or (None if part is None else part.store_type())
        n_queries = 0 if policy is None else policy.n_queries
        return (kind or UniformStore)(keys, values, tracked=tracked, n_queries=n_queries, **sizes)

    def _forget(self) -> None:
        self.tokens_seen, self.has_padding = 0, False
        self.evicted_at, self.last_eviction_check = None, 0
        self._queries: torch.Tensor | None = None
        self._is_unsettled = self._is_decoding = self._should_evict = False
        self.is_bound, self.met = False, None
        # codecs of a text that was loaded, with what had been found out about it
        self._held: tuple[Codec, Codec] | None = None
        self.policy = self.policy_at_reset
        self.scaling, self.softcap = 1.0, None
        self.rope, self.rope_limit = None, 0

    # -- append ------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch_size, self.n_kv_heads, _, self.head_dim = key_states.shape
        self.v_head_dim = value_states.shape[3]
        self.dtype, self.device = key_states.dtype, key_states.device
        for side, codec in prepare_codecs(self, key_states, value_states).items():
            setattr(self.store, side, codec)
        self.keep_originals(self.dtype)
        self.is_initialized = True

    def keep_originals(self, dtype: torch.dtype) -> None:
        """Keep keys as they were appended, where rows of this dtype and `rerotate_keys` ask for it."""
        if self.rerotate_keys:
            from hf_kvcache.rerotation import keep_originals

            keep_originals(self.store, dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append rows `[B, Hkv, S, D]`; returns a `KVView`, and its values."""
        view = self.append(key_states, value_states)
        return view, view.values

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KVView:
        """Add new rows to the dense tail and return the handle that attention reads.

        Raises:
            ValueError: shapes, dtype, device or batch size differ from what the layer holds, or no rows are given.
        """
        self._check(k, v)
        n, is_prefill = k.shape[2], self.tokens_seen == 0
        # past states may have been kept for a `crop` that never came: another generate() without speculation
        if self._is_unsettled:
            self.finish(is_final=n == 1 or self.record_past)
        self.store.append(k, v, None if self.policy is None else self._state_of(k, n))
        self.tokens_seen += n
        if is_prefill:
            # the rows are copied out of the model's projection sooner or later: attention reads adjacent rows faster
            self.store.dense.copy_storage()
            k, v = self.store.dense["k"], self.store.dense["v"]
        return KVView(self, k, v, is_prefill)

    def _state_of(self, k: torch.Tensor, n: int) -> dict[str, torch.Tensor | int]:
        """What a policy has tracked of `n` new rows, as far as it is not zero: where they are in the text."""
        first = self.tokens_seen
        # one token at a time there is one number for all heads
        at = first if n == 1 else torch.arange(first, first + n, dtype=torch.int32, device=k.device)
        if not self.rerotate_keys:
            return {"position": at}
        from hf_kvcache.rerotation import state_of_keys

        return {"position": at} | state_of_keys(self.store, k, at)

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.tokens_seen and k.dim() == 4 and (n := k.shape[2]):
            rows = self.batch_size, self.n_kv_heads, n
            fits = k.shape == (*rows, self.head_dim) and v.shape == (*rows, self.v_head_dim)
            if fits and k.dtype == self.dtype and k.device == self.device:
                return
        check_rows(self, k, v)

    def defer(self) -> None:
        """Compress before the next rows come, unless attention is called before that."""
        self._is_unsettled, self._should_evict = True, False

    # -- what codecs and policies take from the model ----------------------------------------------------------------

    @property
    def needs_model(self) -> bool:
        """Whether a codec or the policy takes something from the model, which `bind` gives it."""
        parts = *self._codecs, self.policy_at_reset
        is_asked = self.rerotate_keys or any(part is not None and "model" in part.needs for part in parts)
        return is_asked and not self.is_bound

    @property
    def codecs(self) -> list[Codec]:
        """Codecs of keys and values, none for a layer that stays dense."""
        return [codec for codec in self._codecs if codec is not None]

    @property
    def ropes(self) -> set[Rope]:
        """The rotary embeddings that this layer with its codecs and its policy hold."""
        return {self.rope, None if self.policy is None else self.policy.rope} - {None}

    def bind(self, context: LayerContext) -> None:
        """Let codecs and policy take from the model what they need; called before the first attention call of a text.

        Raises:
            ValueError: the model cannot give it, or what it gives does not go with the policy.
        """
        if self.policy_at_reset is not None:
            self.policy = self.policy_at_reset.for_model(context)
        for side, template in zip(("keys", "values"), self._held or self._codecs, strict=True):
            if template is None:
                continue
            width = self.head_dim if side == "keys" else self.v_head_dim
            seen = context if width == context.head_dim else replace(context, head_dim=width)
            codec = refit(template, lambda part, seen=seen: part.for_model(seen))
            if self.policy is not None and codec.shares_rows:
                raise ValueError(
                    f"layer {self.layer_idx}: {type(self.policy).__name__} drops tokens head by head, but the basis of "
                    f"the {side} is shared by {codec.heads_per_row} heads; use one with group_size=1"
                )
            setattr(self.store, side, codec)
        needs_rope = self.store.needs_positions or self.rerotate_keys
        self.is_bound, self.rope = True, context.rope() if needs_rope else None
        if self.rerotate_keys and self.rope is None and not context.has_rotary_layers:
            raise ValueError(
                f"{type(context.module).__name__}: rerotate_keys=True rotates keys to neighbouring positions, and this "
                "model has no rotary positions; use rerotate_keys=False"
            )
        # a loaded cache holds rows already
        buffers = [b for b in (self.store.packed, self.store.dense) if "position_ids" in b.tensors]
        held = [buffer["position_ids"] for buffer in buffers]
        self.rope_limit = max((int(rows.max()) + 1 for rows in held if rows.numel()), default=0)
        if self.rope is not None:
            self.rope.cover(self.rope_limit, context.device)

    # -- prepare and compress ----------------------------------------------------------------------------------------

    def prepare(self, call) -> None:
        """Note what the call says of the new rows: padding, positions; and let codecs change them, if they shall.

        Args:
            call: the `AttentionCall` that is about to read the rows.

        Raises:
            ValueError: the policy, a codec or the model does not go with the arguments of the call.
        """
        if self.policy is not None and call.unserved:
            self._check_asked(call)
        if call.n_new > 1 and self.ropes:
            from hf_kvcache.text_positions import check_images

            check_images(self, call)
        if self.policy is not None and not call.sees_all:
            from hf_kvcache.attention.padding import note_padding

            note_padding(self, call)
        if self.store.has_position_ids:
            from hf_kvcache.text_positions import note_positions

            note_positions(self, call)
        if not self.exact_prefill:
            self.store.project(call.n_new)

    def _check_asked(self, call) -> None:
        asked = [name for name in call.unserved if name not in ("output_attentions", "is_causal")]
        if asked:
            raise ValueError(
                f"layer {self.layer_idx}: {type(self.policy).__name__} evicts tokens, and this model calls "
                f"attention with {' and '.join(sorted(asked))}, which is about all of them; use a cache that keeps "
                "every token (KVCache(), QuantCache(4))"
            )

    def compress(self, call) -> None:
        """Evict and pack after attention. While past states are recorded this waits for `crop`.

        Args:
            call: the `AttentionCall` that has read the rows; its query is None where queries do not fit them.
        """
        view, policy, store = call.view, self.policy, self.store
        if view.new_k.requires_grad or view.new_v.requires_grad:
            self._end_gradients()
        incomplete = None if view.cache is None else view.cache.prompt_incomplete
        # verifying drafted tokens is decoding too, several tokens at a time; one token of a prompt is not
        self._is_decoding = incomplete is None and (call.n_new == 1 or (self.record_past and not view.is_prefill))
        self.scaling, self.softcap = call.scaling, call.softcap
        # turning gradients off takes as long as all else here, and in `generate` they are
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if store.n_queries and call.query is not None:
                store.note_queries(call.query)
            self._is_unsettled, is_deferred = True, False
            if policy is not None:
                policy.on_forward(view)
                self._queries = call.query.detach() if policy.wants_queries and call.query is not None else None
                self._should_evict = self._asks_to_evict()
                is_deferred = policy.defer_prefill_eviction and not self._is_decoding and incomplete is None
            if not (self.record_past or is_deferred):
                self._commit(is_final=not incomplete)

    def _end_gradients(self) -> None:
        """Gradients flow within a call; what an earlier one has cached is constant, or its graph would never be freed.

        Attention keeps for its backward pass what it has read, so rows with a graph go on in a copy.
        """
        for buffer in self.store.buffers().values():
            buffer.tensors = {n: t.detach().clone() if t.requires_grad else t for n, t in buffer.tensors.items()}

    @torch.no_grad()
    def finish(self, is_final: bool = True) -> None:
        """Compress what is still waiting: for a `crop`, or for the next tokens to say whether the prompt goes on."""
        if self._is_unsettled:
            self._commit(is_final)

    def _asks_to_evict(self) -> bool:
        n_since = self.tokens_seen - max(self.last_eviction_check, self.evicted_at or 0)
        return self.policy.should_evict(self.store.n_kept, self.tokens_seen, self._is_decoding, n_since)

    def _commit(self, is_final: bool) -> None:
        if self._queries is not None and self._queries.shape[2]:
            self.policy.on_queries(self._queries, self._view())
        if self._should_evict:
            self._evict(is_final)
        self.store.pack()
        self._queries, self._should_evict, self._is_unsettled = None, False, False

    def _evict(self, is_final: bool) -> None:
        """Keep what the policy selects."""
        if self.store.n_packed and not self.store.is_ragged:
            # dense rows are fixed once others are packed, so let go of those that have left the window first
            self.store.pack()
        view, n_fixed = self._view(), self.store.n_fixed
        kept = self.policy.select(self.policy.score(view), view.positions, self.tokens_seen, n_fixed, is_final)
        self._keep(view, kept)

    def _keep(self, view: KVView, kept: torch.Tensor) -> None:
        store, self.last_eviction_check = self.store, self.tokens_seen
        if store.is_ragged and self.policy.all_stay(view, kept):
            return
        self.policy.merge_evicted(view, kept)
        store.keep(kept)
        if self.rope is not None and self.rerotate_keys:
            from hf_kvcache.rerotation import close_gaps

            close_gaps(self)
        self.evicted_at = self.tokens_seen

    def _view(self) -> KVView:
        """What policies see."""
        return KVView(self, *(self.store.dense[s] for s in "kv"), is_prefill=False, positions=self.store.positions)
