"""One attention layer: a store and a policy."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_kvcache.attention.mask import new_token_padding, real_before
from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.dense import Dense
from hf_kvcache.compat import CacheLayerMixin
from hf_kvcache.host import Host
from hf_kvcache.policies.base import Policy
from hf_kvcache.rope import Rope
from hf_kvcache.rope_of_model import refuse_images
from hf_kvcache.stores.ragged import RaggedStore
from hf_kvcache.stores.shared import SharedStore
from hf_kvcache.stores.uniform import UniformStore
from hf_kvcache.view import KVView

ORIGINAL = "original"  # keys as they were appended, beside those that have been rotated since


class ForeignLayerError(AttributeError, ValueError):
    """A model asks its cache for a layer of a kind of its own, which only its config would have told of."""


class KVLayer(CacheLayerMixin):
    """Rows of one layer, appended by `update`, compressed by `settle` once attention has read them.

    Args:
        layer_idx: index of the layer in the model.
        keys, values: codecs, or None to stay dense.
        policy: which tokens stay, or None for all.
        window, n_sink, min_length, max_length: see `UniformStore`.
        exact_prefill, compact: see `KVCache`.
    """

    is_sliding = False
    is_compileable = False
    decides = False  # whether the model's own decisions say what is kept

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
        compact: bool = False,
    ):
        # not the base class's, which would hold tensors of its own
        self.is_initialized = False
        self.layer_idx, self.policy = layer_idx, policy
        sizes = dict(window=window, n_sink=n_sink, min_length=min_length, max_length=max_length)
        self.store = self._make_store(keys, values, policy, compact=compact, **sizes)
        keys, values = self.store.keys, self.store.values
        self.exact_prefill, self.compact = exact_prefill, compact
        self._codecs, self._policy = (keys, values), policy
        self.record_past = False
        self._forget()

    def _make_store(self, keys, values, policy, *, compact, **sizes) -> UniformStore:
        tracked = {} if policy is None else {"position": torch.int32, **policy.state}
        # where in RoPE a key is, as far as it is not where the token is in the text
        tracked |= {"angle": torch.int32} if compact else {}
        kind = SharedStore if keys is not None and keys.share_layers > 1 else UniformStore
        if policy is not None and policy.is_ragged:
            kind, keys, values = RaggedStore, keys or Dense(), values or Dense()
        return kind(keys, values, tracked=tracked, n_queries=policy.n_queries if policy else 0, **sizes)

    def _forget(self) -> None:
        self.tokens_seen = 0
        self.has_padding = False
        self.evicted_at: int | None = None
        self.judged_at = 0
        self._queries: torch.Tensor | None = None
        self._is_unsettled = self._is_decoding = self._is_due = False
        self._is_bound = False
        # codecs of a text that was loaded, with what had been found out about it
        self._held: tuple[Codec, Codec] | None = None
        self.policy = self._policy
        self.scaling, self.softcap = 1.0, None
        self.rope: Rope | None = None
        self._rope_limit = 0

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take new tokens back: past states are recorded, or nothing is ever evicted."""
        return self.policy is None or self.record_past

    @property
    def keys(self) -> torch.Tensor | None:
        """Dense keys `[B, Hkv, N, D]` of the rows kept, expanded anew at every access; None before the first token.

        Raises:
            ValueError: heads keep different numbers of rows.
        """
        return self.store.logical_rows()[0] if self.tokens_seen else None

    @property
    def values(self) -> torch.Tensor | None:
        """Dense values `[B, Hkv, N, D]`, as `keys`."""
        return self.store.logical_rows()[1] if self.tokens_seen else None

    @property
    def is_decoding(self) -> bool:
        """Whether the newest call was a decoding step, as far as is known."""
        return self._is_decoding

    def restored(self) -> None:
        """A saved layer has got its tensors back."""

    def keep_originals(self, dtype: torch.dtype) -> None:
        """Keep keys as they were appended where a key that is rotated again and again would lose its direction.

        Args:
            dtype: of the rows to come.
        """
        if self.compact and dtype.itemsize < 4:
            self.store.track(ORIGINAL, dtype)
        elif ORIGINAL in self.store.tracked:
            # an earlier text was of another dtype
            self.store.untrack(ORIGINAL)

    @property
    def lacks_originals(self) -> str:
        return (
            "the file has no keys as they were appended, which compact=True rotates in 16 bits; it is of an earlier "
            "release: make the cache again"
        )

    def __getattr__(self, name: str):
        raise ForeignLayerError(
            f"a {type(self).__name__} has no {name!r}; if a model asks for it, the model has cache layers of a kind of "
            "its own: construct the cache with config=model.config"
        )

    # -- append, attend, compress ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch_size, self.n_kv_heads, _, self.head_dim = key_states.shape
        self.v_head_dim = value_states.shape[3]
        self.dtype, self.device = key_states.dtype, key_states.device
        fitting = {}
        for side, width in (("keys", self.head_dim), ("values", self.v_head_dim)):
            codec = getattr(self.store, side)
            if codec is not None:
                try:
                    codec.check(key_states.new_zeros(1, self.n_kv_heads, self.store.step, width))
                except (ValueError, StopIteration) as error:
                    raise ValueError(f"{side} of layer {self.layer_idx} cannot be encoded: {error}") from error
                fitting[side] = codec.for_shape(self.n_kv_heads, width)
        for side, codec in fitting.items():
            setattr(self.store, side, codec)
        self.keep_originals(self.dtype)
        self.is_initialized = True

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
        # past states may have been kept for a `crop` that never came: another generate() without speculation
        self.finish(is_final=k.shape[2] == 1 or self.record_past)
        is_prefill, n = self.tokens_seen == 0, k.shape[2]
        self.store.append(k, v)
        if self.policy is not None:
            fresh = torch.arange(self.tokens_seen, self.tokens_seen + n, dtype=torch.int32, device=k.device)
            for name in ("position", "angle") if self.compact else ("position",):
                self.store.dense[name][:, :, -n:] = fresh
            if ORIGINAL in self.store.tracked:
                self.store.dense[ORIGINAL][:, :, -n:] = k.detach()
        self.tokens_seen += n
        if is_prefill:
            # the rows are copied out of the model's projection sooner or later: attention reads adjacent rows faster
            self.store.dense.own()
            k, v = self.store.dense["k"], self.store.dense["v"]
        return KVView(self, k, v, is_prefill)

    @property
    def ropes(self) -> set[Rope]:
        """The rotary embeddings that this layer with its codecs and its policy hold."""
        return {self.rope, None if self.policy is None else self.policy.rope} - {None}

    @property
    def needs_model(self) -> bool:
        """Whether a codec or the policy takes something from the model, which `bind` gives it."""
        if self._is_bound:
            return False
        return self.compact or any(part is not None and "model" in part.needs for part in self._parts)

    @property
    def codecs(self) -> list[Codec]:
        """Codecs of keys and values, none for a layer that stays dense."""
        return [codec for codec in self._codecs if codec is not None]

    @property
    def _parts(self):
        return *self._codecs, self._policy

    def check_expandable(self) -> None:
        """Raise ValueError unless a model may compute with the rows itself, before it calls attention."""
        policy, needs = self._policy, frozenset().union(*(codec.needs for codec in self.codecs))
        name, codecs = type(policy).__name__, " and ".join(sorted({str(codec) for codec in self.codecs}))
        is_scored_by_queries = policy is not None and (policy.n_queries or policy.observes)
        refused = {
            f"{name} goes by the decisions of the model": self.decides,
            f"{name} scores rows by queries, which do not fit latents": is_scored_by_queries,
            f"{name} takes something of the model's keys and values": policy is not None and "model" in policy.needs,
            f"{name} merges rows": policy is not None and policy.folds,
            f"{codecs} goes by queries, which do not fit latents": "queries" in needs,
            f'{codecs} takes RoPE off keys; use LowRank(rope="post")': "positions" in needs,
            "exact_prefill=False changes new rows before attention": not self.exact_prefill,
            "compact=True rotates keys": self.compact,
        }
        for why, is_asked in refused.items():
            if is_asked:
                raise ValueError(
                    f"layer {self.layer_idx}: this model computes with keys and values between cache and attention "
                    f"(latents that it expands, or an attention of its own), and {why}"
                )

    def defer(self) -> None:
        """Compress before the next rows come, unless attention is called before that."""
        self._is_unsettled, self._is_due = True, False

    def bind(self, host: Host) -> None:
        """Let codecs and policy take from the model what they need; called before the first attention call of a text.

        Raises:
            ValueError: the model cannot give it, or what it gives does not go with the policy.
        """
        if self._policy is not None:
            self.policy = self._policy.for_model(host)
        for side, template in zip(("keys", "values"), self._held or self._codecs, strict=True):
            if template is None:
                continue
            width = self.head_dim if side == "keys" else self.v_head_dim
            codec = template.for_model(host if width == host.head_dim else replace(host, head_dim=width))
            if self.policy is not None and codec.shares_rows:
                raise ValueError(
                    f"layer {self.layer_idx}: {type(self.policy).__name__} drops tokens head by head, but the basis of "
                    f"the {side} is shared by {codec.heads_per_row} heads; use one with group_size=1"
                )
            setattr(self.store, side, codec)
        needs_rope = self.store.needs_positions or self.compact
        self._is_bound, self.rope = True, host.rope() if needs_rope else None
        if self.compact and self.rope is None and not host.has_rotary_layers:
            raise ValueError(
                f"{type(host.module).__name__}: compact=True rotates keys to neighbouring positions, and this model "
                "has no rotary positions; use compact=False"
            )
        # a loaded cache holds rows already
        held = [buffer["rope"] for buffer in (self.store.packed, self.store.dense) if "rope" in buffer.tensors]
        self._rope_limit = max((int(rows.max()) + 1 for rows in held if rows.numel()), default=0)
        if self.rope is not None:
            self.rope.cover(self._rope_limit, host.device)

    def refuse_images(self, module: torch.nn.Module, mask, n_new: int) -> None:
        """Refuse tokens whose positions in RoPE are not those of a text, where keys or queries are rotated by them.

        Raises:
            ValueError: there are some, or the model does not show whether there are.
        """
        ropes = [rope for rope in self.ropes if rope.is_multimodal] if n_new > 1 else []
        if ropes:
            refuse_images(module, ropes, new_token_padding(mask, n_new, self.tokens_seen))

    def note_positions(self, position_ids: torch.Tensor | None, mask, n_new: int) -> None:
        """Note where in the text the new rows are, for codecs that undo RoPE.

        Args:
            position_ids: `[B | 1, S]`; None means that nothing is padded.
            mask: what the attention function got.

        Raises:
            ValueError: positions of another shape (such as those of images), or padding without positions.
        """
        if not self.store.has_rope:
            return
        rows = self.store.dense["rope"][:, :, -n_new:]
        if not self.store.needs_positions:
            # which rows are real is all there is to note
            position_ids = None
        elif position_ids is None and self.rope is not None and self.rope.is_multimodal:
            # such models show them for prompts alone
            position_ids = real_before(mask, n_new, self.tokens_seen)
        if position_ids is None:
            is_real = new_token_padding(mask, n_new, self.tokens_seen) if self.store.needs_positions else None
            if is_real is not None and not is_real.all():
                raise ValueError(
                    f"layer {self.layer_idx}: the batch is padded, and the model does not say at which positions its "
                    'tokens are; use LowRank(rope="post")'
                )
            start = self.tokens_seen - n_new
            position_ids = torch.arange(start, self.tokens_seen, device=rows.device).unsqueeze(0)
        if position_ids.dim() != 2 or position_ids.shape[1] != n_new:
            raise ValueError(
                f"layer {self.layer_idx}: positions {list(position_ids.shape)} are not [B, {n_new}]; "
                'LowRank(rope="post") does not need them'
            )
        rows.copy_(position_ids.unsqueeze(1))
        # only what is fitted to rows asks which of them are real
        is_asked = n_new > 1 and self.store.is_unfitted
        is_real = new_token_padding(mask, n_new, self.tokens_seen) if is_asked else None
        if is_real is not None:
            rows.masked_fill_(~is_real.unsqueeze(1), -1)
        self._cover(position_ids)

    def _cover(self, position_ids: torch.Tensor) -> None:
        """See to it that the rotary tables reach these positions."""
        if self.rope is None:
            return
        if position_ids.device.type == "cpu" or position_ids.shape[1] > 1:
            self._rope_limit = max(self._rope_limit, int(position_ids.max()) + 1)
        else:
            # asking the device would stall it at every step; text goes on one position after another
            self._rope_limit += 1
            torch._assert_async((position_ids < self._rope_limit).all())
        self.rope.cover(self._rope_limit, self.device)

    def project_new(self, n_new: int) -> None:
        """With `exact_prefill=False`, let the newest rows be what packing will make of them."""
        store = self.store
        if self.exact_prefill or store.keys is None:
            return
        store.fit()
        rope = store.dense["rope"][:, :, -n_new:].clamp(min=0) if store.needs_positions else None
        for side, codec in (("k", store.keys), ("v", store.values)):
            rows = store.dense[side][:, :, -n_new:]
            encoded = codec.encode(rows, None, rope)
            rows.copy_(codec.decode(encoded, rows.dtype, rows.shape[-1], rope))

    def note_padding(self, mask, n_new: int) -> None:
        """Mark new rows that are padding, so that they are neither seen nor kept."""
        # without padding so far, a single new token is none: a row has at least one token per call
        if self.policy is None or (n_new == 1 and not self.has_padding and self.tokens_seen > 1):
            return
        is_real = new_token_padding(mask, n_new, self.tokens_seen)
        if is_real is not None and not is_real.all():
            self.has_padding = True
            rows = self.store.dense["position"][:, :, -n_new:]
            rows.masked_fill_(~is_real.unsqueeze(1), -1)

    @torch.no_grad()
    def settle(
        self, q: torch.Tensor | None, view: KVView, scaling: float | None = None, softcap: float | None = None
    ) -> None:
        """Evict and pack after attention. While past states are recorded this waits for `crop`.

        Args:
            q: queries after RoPE `[B, Hq, S, D]`; None where they do not fit the rows (see `check_expandable`).
            view: what attention has read.
            scaling, softcap: of the scores.
        """
        self._end_gradients(view)
        goes_on = None if view.cache is None else view.cache.prompt_goes_on
        # verifying drafted tokens is decoding too, several tokens at a time; one token of a prompt is not
        self._is_decoding = goes_on is None and (view.n_new == 1 or (self.record_past and not view.is_prefill))
        self.scaling, self.softcap = self.head_dim**-0.5 if scaling is None else scaling, softcap
        if q is not None:
            self.store.note_queries(q)
        if self.policy is not None:
            self.policy.note(view)
            self._queries = q.detach() if self.policy.observes else None
        self._is_due, self._is_unsettled = self._asks_to_evict(), True
        waits = self.policy is not None and self.policy.waits and not self._is_decoding and goes_on is None
        if not self.record_past and not waits:
            self._commit(is_final=not goes_on)

    def _end_gradients(self, view: KVView) -> None:
        """Gradients flow within a call; what an earlier one has cached is constant, or its graph would never be freed.

        Attention keeps for its backward pass what it has read, so rows with a graph go on in a copy.
        """
        if not (view.new_k.requires_grad or view.new_v.requires_grad):
            return
        for buffer in self.store.buffers().values():
            buffer.tensors = {n: t.detach().clone() if t.requires_grad else t for n, t in buffer.tensors.items()}

    @torch.no_grad()
    def finish(self, is_final: bool = True) -> None:
        """Compress what is still waiting: for a `crop`, or for the next tokens to say whether the prompt goes on."""
        if self._is_unsettled:
            self._commit(is_final)

    def _asks_to_evict(self) -> bool:
        if self.policy is None:
            return False
        n_since = self.tokens_seen - max(self.judged_at, self.evicted_at or 0)
        return self.policy.is_due(self.store.n_kept, self.tokens_seen, self._is_decoding, n_since)

    def _commit(self, is_final: bool = True) -> None:
        if self._queries is not None and self._queries.shape[2]:
            self.policy.observe(self._queries, self._view())
        if self._is_due:
            self._evict(is_final)
        self.store.pack()
        self._queries, self._is_due, self._is_unsettled = None, False, False

    def _evict(self, is_final: bool) -> None:
        """Keep what the policy selects."""
        store = self.store
        if store.n_packed and not store.is_ragged:
            # dense rows are fixed once others are packed, so let go of those that have left the window first
            store.pack()
        view = self._view()
        kept = self.policy.select(self.policy.score(view), store.positions, self.tokens_seen, store.n_fixed, is_final)
        self.judged_at = self.tokens_seen
        if store.is_ragged and (kept | (store.positions < 0)).all():
            return
        self.policy.fold(view, kept)
        store.keep(kept)
        if self.rope is not None and self.compact:
            self._close_gaps()
        self.evicted_at = self.tokens_seen

    def _view(self) -> KVView:
        """What policies see."""
        return KVView(self, self.store.dense["k"], self.store.dense["v"], is_prefill=False)

    def _close_gaps(self) -> None:
        """Rotate kept keys so that they stand side by side, the newest one where it was."""
        store = self.store
        is_real = store.positions >= 0
        n_after = is_real.flip(-1).cumsum(-1).flip(-1) - 1  # real rows behind a row, of its head
        target = torch.where(is_real, self.tokens_seen - 1 - n_after, 0).int()
        # an original is rotated once, from the position at which it was appended
        source = ORIGINAL if ORIGINAL in store.tracked else "k"
        start = store.positions if source == ORIGINAL else store.state("angle")
        self.rope.cover(self.tokens_seen, self.device)
        store.rotate_keys(self.rope.turn, torch.where(is_real, target - start, 0), source)
        store.set_state("angle", target)

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen: positions follow from this."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are about all tokens, whichever are kept: attention takes the columns of the rows that are there."""
        return self.tokens_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Speculative decoding begins: compress only once `crop` has said which tokens stay."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError where `crop` would have to bring back what is gone."""
        n = -int(tokens_to_remove)
        if n < 0:
            raise ValueError("crop() takes the tokens to remove as a number that is zero or negative")
        n = min(n, self.tokens_seen)
        if self.evicted_at is not None and n > self.tokens_seen - self.evicted_at + self.policy.n_recent:
            raise ValueError(
                f"cannot crop {n} tokens: {type(self.policy).__name__} has already evicted tokens among them; "
                f"raise n_recent (now {self.policy.n_recent})"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (transformers passes zero or a negative number)."""
        self.check_crop(tokens_to_remove)
        n = min(-int(tokens_to_remove), self.tokens_seen)
        if n:
            self.store.crop(n)
            self.tokens_seen -= n
            self._is_due = self._is_due and self._asks_to_evict()
            if self._queries is not None:
                # rejected drafts must not have a say in what is evicted
                self._queries = self._queries[:, :, :-n]
        self.finish()
        if not self.tokens_seen:
            self.reset()

    def reset(self) -> None:
        """Forget every token; the bytes are freed."""
        for buffer in self.store.buffers().values():
            buffer.clear()
        self.store.keys, self.store.values = self._codecs
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Keep these rows of the batch: integers (tensor, list, tuple) or a boolean mask `[B]`."""
        indices = batch_indices(indices, self.batch_size if self.is_initialized else -1)
        self._map_batch(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move every payload to CPU memory."""
        self._move(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move every payload back to the device of the layer."""
        if self.is_initialized:
            self._move(lambda t: t.to(self.device, non_blocking=True))

    def _move(self, change) -> None:
        for buffer in self.store.buffers().values():
            buffer.move(change)
        if self._queries is not None:
            self._queries = change(self._queries)

    def _map_batch(self, change) -> None:
        for buffer in self.store.buffers().values():
            buffer.map_batch(change)
        if self.store.dense.tensors:
            self.batch_size = self.store.dense.tensors["k"].shape[0]
        if self._queries is not None:
            self._queries = change(self._queries)

    # -- bytes -------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated for this layer, spare rows and metadata included."""
        return self.store.nbytes

    @property
    def nbytes_dense(self) -> int:
        """Bytes of a dense cache of the tokens seen."""
        if not self.tokens_seen:
            return 0
        row = self.n_kv_heads * (self.head_dim + self.v_head_dim) * torch.finfo(self.dtype).bits // 8
        return self.batch_size * self.tokens_seen * row

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        where = f"layer {self.layer_idx}"
        if k.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(f"{where}: keys {list(k.shape)} and values {list(v.shape)} must be [B, Hkv, S, D]")
        if not k.shape[2]:
            raise ValueError(f"{where}: the input is empty; a forward pass needs at least one token")
        if k.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{where}: keys are {k.dtype}; a cache holds float16, bfloat16 or float32")
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if not self.tokens_seen:
            self.batch_size, self.dtype, self.device = k.shape[0], k.dtype, k.device
        held = self.batch_size, self.n_kv_heads, self.head_dim, self.v_head_dim, self.dtype, self.device
        if (k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device) == held:
            return
        found = {
            "batch size": (k.shape[0], self.batch_size),
            "KV heads": (k.shape[1], self.n_kv_heads),
            "head size": (k.shape[3], self.head_dim),
            "head size of the values": (v.shape[3], self.v_head_dim),
            "dtype": (k.dtype, self.dtype),
            "device": (k.device, self.device),
        }
        for what, (got, held) in found.items():
            if got != held:
                raise ValueError(
                    f"{where}: {what} of the new tokens is {got}, of the cache {held}; "
                    "use a new cache (or reset() this one) for another batch or model"
                )


def batch_indices(indices, batch_size: int) -> torch.Tensor:
    """Rows of a batch as int64 `[B']`.

    Args:
        indices: integers, as a tensor, list or tuple; or a boolean mask `[B]`.
        batch_size: `B`; negative while it is not known.

    Raises:
        IndexError: there is no such row, or the mask has another size.
        TypeError: something else was given.
    """
    indices = torch.as_tensor(indices)
    if indices.dtype == torch.bool:
        if batch_size >= 0 and indices.shape != (batch_size,):
            raise IndexError(f"a mask of {list(indices.shape)} rows for a batch of {batch_size}")
        return indices.nonzero().flatten()
    if indices.is_floating_point() or indices.is_complex() or indices.dim() != 1:
        raise TypeError(f"rows of a batch are integers or a boolean mask, not {indices.dtype} {list(indices.shape)}")
    # a GPU would have to be waited for at every step of a beam search, whose indices are right
    if batch_size >= 0 and indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if not -batch_size <= low <= high < batch_size:
            raise IndexError(f"row {low if low < -batch_size else high} of a batch of {batch_size}")
        return indices.long() % batch_size
    return indices.long()
