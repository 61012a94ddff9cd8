"""One attention layer of a retrofitted model: the model decides, the layer keeps what it says."""

from __future__ import annotations

import torch

from hf_kvcache import compat
from hf_kvcache.adapters.modules import attached_retrofit
from hf_kvcache.dmc.attention import attend_trained
from hf_kvcache.dmc.hooks import Call
from hf_kvcache.dmc.masks import expiry
from hf_kvcache.dmc.merging import Past, merge
from hf_kvcache.dmc.padding import first_tokens
from hf_kvcache.dmc.policies import TrainedEviction
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.dmc.store import TrainedStore
from hf_kvcache.kernels.merge_step import merge_step
from hf_kvcache.layer import KVLayer
from hf_kvcache.row_shapes import check_rows
from hf_kvcache.view import KVView


class TrainedLayer(KVLayer):
    """Rows of one layer under `DMC` or `DMS`; hooks on the model's projections bring the decisions (`start_call`).

    A call changes nothing before its tokens are taken in, whole: `place` and `compress` do, and after an exception
    `abandon` finds the layer as it was.

    Attributes:
        first: position of every row's first token that is no padding, int64 `[B]` on the CPU; None before there are
            rows.
        call: the call of the attention module that is under way, or None.
        cached_rows: what `TrainedStore.cached_rows` has found for a call of many tokens, or None.
        seen_until: last position at which its rows are seen, int32 `[B, Hkv, S]`.
        window: that its rows were made with, or None.
        all_begun: whether every row of the batch is known to have seen a real token.
    """

    is_croppable = False

    def _make_store(self, keys, values, **sizes) -> TrainedStore:
        return TrainedStore(keys, values)

    def _forget(self) -> None:
        super()._forget()
        self.call: Call | None = None
        self.cached_rows = self.seen_until = self.window = self.first = None
        self.all_begun = False

    @property
    def has_begun(self) -> torch.Tensor | None:
        """Rows of the batch that have seen a real token, boolean `[B]`; None before the first call."""
        return self.store.has_begun

    # -- what the hooks ask ------------------------------------------------------------------------------------------

    def start_call(self, call: Call) -> None:
        """Decisions of new tokens are there; their rows will follow.

        Raises:
            ValueError: the rows so far were made with another window, by an adapter that was active then; or another
                batch goes on.
        """
        B, H, _ = call.alpha.shape
        if self.window not in (None, call.settings.window):
            raise ValueError(
                f"layer {self.layer_idx}: the rows so far were made with window={self.window}, and the adapter that is "
                f"active now has window={call.settings.window}; use a new cache"
            )
        self.window = call.settings.window
        if self.has_begun is None:
            self.store.allocate(B, H, call.settings.delay, call.alpha.device, call.logits.dtype)
        elif self.store.packed.table.shape[:2] != (B, H):
            held = list(self.store.packed.table.shape[:2])
            raise ValueError(
                f"layer {self.layer_idx}: batch size and KV heads of the new tokens are {[B, H]}, of the cache {held}; "
                "use a new cache (or reset() this one) for another batch or model"
            )
        self.call = call

    def read_mask(self, mask, call: Call, batch: int, n_new: int, device) -> None:
        """Note in a call which of its tokens are real, and where rows begin.

        Raises:
            ValueError: the mask hides tokens that have rows, shows padding that has none, or see `first_tokens`.
        """
        start = self.tokens_seen
        try:
            first = first_tokens(mask, n_new, start + n_new)
        except ValueError as error:
            raise ValueError(f"layer {self.layer_idx}: {error}") from None
        if first is not None and first.shape[0] not in (1, batch):
            raise ValueError(
                f"layer {self.layer_idx}: the attention mask is of {len(first)} rows, the input of {batch}"
            )
        call.first = torch.zeros(batch, dtype=torch.long) if first is None else first.expand(batch)
        if self.first is not None and self.first.shape == call.first.shape:
            self._check_past(self.first, call.first)
        if first is not None and (first > start).any():
            call.is_real = torch.arange(start, start + n_new, device=device) >= call.first.unsqueeze(-1).to(device)

    def _check_past(self, before: torch.Tensor, now: torch.Tensor) -> None:
        is_hidden = (before < self.tokens_seen) & (now > before)
        if not (is_hidden | (now < before)).any():
            return
        what = (
            "hides tokens that were real when they came, and are part of its rows"
            if is_hidden.any()
            else "shows tokens that were padding when they came, and have no rows"
        )
        raise ValueError(
            f"layer {self.layer_idx}: the attention mask {what}; {type(self.policy).__name__} cannot tell tokens "
            "apart any more: pass the mask of the whole text as it was, with ones for new tokens, or use a new cache"
        )

    def merge(self, side: str, x: torch.Tensor, call: Call) -> torch.Tensor:
        """Running means of new tokens `[B, S, Hkv, D]`, the open segment going on; the same shape."""
        window, store = call.settings.window, self.store
        segment, weights = store.open_segment(side, x, window), store.segment_weights(window, call.omega)
        # models project keys first, or values
        call.n_merged += 1
        if x.shape[1] == 1:
            return self._merge_one(side, x, call, segment, weights).unsqueeze(1)
        w, S = segment.shape[2], x.shape[1]
        # oldest first: all but the one that the first new token takes the place of, or the mean so far
        order = (self.tokens_seen + torch.arange(min(window, 1), max(window, 1), device=x.device)) % w
        past = Past(segment[:, :, order], weights[..., order])
        rows = x.transpose(1, 2)
        means = merge(rows, call.omega, call.alpha, window, past)
        # how much every token still counts in the segment that is open at the end
        going_on = torch.nn.functional.pad(call.alpha[..., 1:].to(call.omega.dtype), (0, 1), value=1.0)
        chain = going_on.flip(-1).cumprod(-1).flip(-1)
        left, before = call.omega * chain, chain[..., :1] * call.alpha[..., :1]
        if not window:
            newest = means[:, :, -1:].to(segment.dtype, copy=True)
            ends = left.sum(-1, keepdim=True) + weights * before
        else:
            n = min(S, w)
            cells = torch.arange(self.tokens_seen + S - n, self.tokens_seen + S, device=x.device) % w
            newest = segment.index_copy(2, cells, rows[:, :, -n:].to(segment.dtype))
            ends = (weights * before).index_copy(-1, cells, left[..., -n:])
        call.open_segment |= {f"{side}.open_segment": newest, "weights": ends}
        return means.transpose(1, 2)

    def _merge_one(self, side, x, call, segment, weights) -> torch.Tensor:
        alpha, omega, rows = call.alpha, call.omega, x[:, 0]
        if not call.settings.window:
            # the mean so far counts as one member
            if call.n_merged == 1:
                total = weights * alpha + omega
                call.share = omega / total
                call.open_segment["weights"] = total
            mean = segment[:, :, 0].lerp(rows.to(segment.dtype), call.share.to(segment.dtype))
            call.open_segment[f"{side}.open_segment"] = mean.unsqueeze(2)
            return mean.to(x.dtype)
        cell = self.tokens_seen % segment.shape[2]
        if call.n_merged == 1:
            weights = weights * alpha
            weights[..., cell] = omega[..., 0]
            call.open_segment["weights"] = weights
        if x.requires_grad:
            segment = call.open_segment[f"{side}.open_segment"] = segment.clone()
        # what this cell held does not count beside any next token, so it may be written at once
        return merge_step(rows.contiguous(), call.open_segment["weights"], segment, cell)

    # -- append, attend, compress ------------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KVView:
        """Take new rows `[B, Hkv, S, D]`, already merged; a single one goes to its place at once.

        Raises:
            ValueError: the model has not said what to do with them, or see `KVLayer.append`.
        """
        if self.call is None and not self.tokens_seen:
            # the first layer of a model that may turn out to have a window there; otherwise `check_ready` raises
            return KVView(self, k, v, is_prefill=True)
        if self.call is None or self.call.alpha.shape != k.shape[:3]:
            raise ValueError(self.lacks_decisions)
        check_rows(self, k, v)
        store, start, alpha, is_real = self.store, self.tokens_seen, self.call.alpha, self.call.is_real
        store.dtype, store.head_dim = k.dtype, k.shape[-1]
        self.tokens_seen += k.shape[2]
        self.call.n_appended = k.shape[2]
        if k.shape[2] > 1:
            self.cached_rows = store.cached_rows(start, alpha[..., 0])
            self.seen_until = expiry(alpha, is_real, start, self.call.settings.delay)
        return KVView(self, k, v, is_prefill=False)

    def place(self, view: KVView) -> None:
        """Take in the row of a single token, for which attention looks among all others."""
        call = self.call
        is_real = None if call.is_real is None else call.is_real[:, 0]
        self.store.place(view.new_k, view.new_v, call.alpha[..., 0], is_real, self.tokens_seen - 1)
        self._taken_in(call)

    def _taken_in(self, call: Call) -> None:
        """Rows of a call are there: so is what goes with them."""
        call.n_appended = 0
        self.store.put_layer_state(call.open_segment)
        call.open_segment = {}
        if self.first is None or not torch.equal(self.first, call.first):
            H = call.alpha.shape[1]
            first = call.first.to(call.alpha.device, torch.int32)
            self.first = call.first
            self.store.put_layer_state({"first": first.view(-1, 1, 1).expand(-1, H, 1)})
        if not self.all_begun:
            self.all_begun = call.is_real is None or bool(self.store.has_begun.all())

    def abandon(self, call: Call) -> None:
        """A call is over: if its rows have not been taken in, because of an exception, it has never been."""
        if self.call is call:
            self.tokens_seen -= call.n_appended
            self.call = self.cached_rows = self.seen_until = None
            if not self.tokens_seen:
                self.reset()

    @property
    def lacks_decisions(self) -> str:
        return (
            f"layer {self.layer_idx}: {type(self.policy).__name__} goes by the decisions of a retrofitted model, "
            "and this one makes none; trainers/train_dmc.py retrofits a model, hf_kvcache.dmc.load loads one"
        )

    def check_ready(self) -> None:
        """Raise ValueError where the attention module has made no decisions for its tokens."""
        if self.call is None:
            raise ValueError(self.lacks_decisions)

    def prepare(self, call) -> None:
        """Padding is known from the hooks."""
        self.check_ready()

    def attend(self, call):
        """Attention over rows that are seen as long as the decisions say."""
        out = attend_trained(call, attached_retrofit(call.module))
        return out.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def compress(self, call) -> None:
        """Let rows go that nothing will see again, once attention has read them."""
        view = call.view
        if view.new_k.requires_grad or view.new_v.requires_grad:
            self._end_gradients()
        if self.seen_until is not None:
            start, until = self.tokens_seen - view.n_new, None if self.cached_rows is None else self.cached_rows[2]
            self.store.commit(view.new_k, view.new_v, self.seen_until, until, start, self.call.alpha[..., 0])
            self._taken_in(self.call)
        self.call = self.cached_rows = self.seen_until = None

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are of the whole text, so that `read_mask` sees what they say of tokens held."""
        return self.tokens_seen + query_length, 0

    def activate_past_recording(self) -> None:
        self.policy_at_reset.check_recording()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"cannot crop: {type(self.policy_at_reset).__name__} has merged or overwritten rows of earlier tokens; "
                "copy.deepcopy(cache) before what may have to be taken back"
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for this layer, spare rows and metadata included."""
        return super().nbytes + (0 if self.first is None else self.first.nbytes)

    def _map_batch(self, change) -> None:
        super()._map_batch(change)
        if self.store.packed.table is not None:
            self.batch_size = self.store.packed.table.shape[0]
            self.first = self.store.first

    # -- what saving asks --------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        if self.call is not None:
            raise ValueError(
                f"layer {self.layer_idx} is in the middle of a forward pass, or one has failed: its newest rows have "
                "no place yet; save the cache when the pass is over"
            )

    @property
    def described(self) -> dict:
        return {"window": self.window}

    def restored(self, entry) -> None:
        self.window = entry.window
        if self.is_initialized:
            self.store.head_dim = self.head_dim
            # files of earlier releases do not say: the next mask does
            self.first = self.store.first
            self.all_begun = bool(self.store.has_begun.all())


def layer_of(cache, attention: torch.nn.Module, settings: Settings) -> TrainedLayer | None:
    """The layer of a cache that takes the rows of a retrofitted attention module; None without a cache.

    One of transformers' own is let pass as long as it is empty, because models make one whether it is used or not.

    Raises:
        ValueError: the cache is for something else.
    """
    if cache is None:
        return None
    policy = getattr(cache, "policy", None)
    if not isinstance(policy, TrainedEviction):
        if hasattr(cache, "policy") or cache.get_seq_length(attention.layer_idx):
            kind = "DMCCache" if settings.merges else "DMSCache"
            raise ValueError(
                f"layer {attention.layer_idx}: the model was retrofitted for {settings.method.upper()}, and its rows "
                f"cannot go on in a {type(cache).__name__}; use {compat.CACHE_NAME}={kind}()"
            )
        return None
    if policy.method != settings.method:
        raise ValueError(
            f"layer {attention.layer_idx}: the model was retrofitted for {settings.method.upper()}, the cache is for "
            f"{policy.method.upper()}"
        )
    return cache.layer_for(attention)
