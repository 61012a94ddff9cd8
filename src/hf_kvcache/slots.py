"""One attention layer of a retrofitted model: the model decides, the layer keeps what it says."""

from __future__ import annotations

import torch

from hf_kvcache.dmc.hooks import Call
from hf_kvcache.dmc.masks import expiry
from hf_kvcache.dmc.merging import Past, merge
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.kernels.merge_step import merge_step
from hf_kvcache.layer import KVLayer
from hf_kvcache.policies.learned import Learned
from hf_kvcache.stores.slots import SlotStore
from hf_kvcache.view import KVView


class SlotLayer(KVLayer):
    """Rows of one layer under `DMC` or `DMS`; hooks on the model's projections bring the decisions (`begin`).

    Attributes:
        call: the call of the attention module that is under way, or None.
        held: what `SlotStore.held` has found for a call of many tokens, or None.
        seen_until: last position at which its rows are seen, int32 `[B, Hkv, S]`.
        window: that its rows were made with, or None.
        all_begun: whether every row of the batch is known to have seen a real token.
    """

    decides = True
    is_croppable = False

    def _make_store(self, keys, values, policy, **sizes) -> SlotStore:
        return SlotStore(keys, values)

    def _forget(self) -> None:
        super()._forget()
        self.call: Call | None = None
        self.held = self.seen_until = self.window = None
        self.all_begun = False

    @property
    def has_begun(self) -> torch.Tensor | None:
        """Rows of the batch that have seen a real token, boolean `[B]`; None before the first call."""
        return self.store.has_begun

    # -- what the hooks ask ------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
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
            self.store.begin(B, H, call.settings.delay, call.alpha.device, call.logits.dtype)
        elif self.store.packed.table.shape[:2] != (B, H):
            held = list(self.store.packed.table.shape[:2])
            raise ValueError(
                f"layer {self.layer_idx}: batch size and KV heads of the new tokens are {[B, H]}, of the cache {held}; "
                "use a new cache (or reset() this one) for another batch or model"
            )
        self.call = call

    def refuse_gaps(self, is_real: torch.Tensor | None) -> None:
        """Refuse new tokens `[B, S]` that are padding behind a real one.

        Raises:
            ValueError: there are some.
        """
        if is_real is None:
            return
        has_begun = is_real.cumsum(-1) > 0
        if self.has_begun is not None:
            has_begun |= self.has_begun.unsqueeze(-1)
        if (has_begun & ~is_real).any():
            raise ValueError(
                f"layer {self.layer_idx}: padding between the tokens of a row, whose decisions are about their "
                "neighbours; pad on the left, before the first token"
            )

    def merge(self, side: str, x: torch.Tensor, call: Call) -> torch.Tensor:
        """Running means of new tokens `[B, S, Hkv, D]`, the open segment going on; the same shape."""
        window, store = call.settings.window, self.store
        taps, weights = store.taps(side, x, window), store.tap_weights(window, call.omega)
        # models project keys first, or values
        call.n_merged += 1
        if x.shape[1] == 1:
            return self._merge_one(x, call, taps, weights).unsqueeze(1)
        w, S = taps.shape[2], x.shape[1]
        # oldest first: all but the one that the first new token takes the place of, or the mean so far
        order = (self.tokens_seen + torch.arange(min(window, 1), max(window, 1), device=x.device)) % w
        past = Past(taps[:, :, order], weights[..., order])
        rows = x.transpose(1, 2)
        means = merge(rows, call.omega, call.alpha, window, past)
        # how much every token still counts in the segment that is open at the end
        going_on = torch.nn.functional.pad(call.alpha[..., 1:].to(call.omega.dtype), (0, 1), value=1.0)
        chain = going_on.flip(-1).cumprod(-1).flip(-1)
        left, before = call.omega * chain, chain[..., :1] * call.alpha[..., :1]
        if not window:
            taps[:, :, 0] = means[:, :, -1]
            ends = left.sum(-1, keepdim=True) + weights * before
        else:
            n = min(S, w)
            cells = torch.arange(self.tokens_seen + S - n, self.tokens_seen + S, device=x.device) % w
            taps[:, :, cells] = rows[:, :, -n:].to(taps.dtype)
            ends = weights * before
            ends[..., cells] = left[..., -n:]
        if call.n_merged == 2:
            # both sides have been merged with the weights that they began with
            weights.copy_(ends)
        return means.transpose(1, 2)

    def _merge_one(self, x, call, taps, weights) -> torch.Tensor:
        alpha, omega, rows = call.alpha, call.omega, x[:, 0]
        if not call.settings.window:
            # the mean so far counts as one member
            if call.n_merged == 1:
                weights *= alpha
                call.share = omega / (weights + omega)
                weights += omega
            mean = taps[:, :, 0].lerp_(rows.to(taps.dtype), call.share.to(taps.dtype))
            return mean.to(x.dtype)
        cell = self.tokens_seen % taps.shape[2]
        if call.n_merged == 1:
            weights *= alpha
            weights[..., cell] = omega[..., 0]
        return merge_step(rows.contiguous(), weights, taps, cell)

    # -- append, attend, compress ------------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KVView:
        """Take new rows `[B, Hkv, S, D]`, already merged; a single one goes to its place at once.

        Raises:
            ValueError: the model has not said what to do with them, or see `KVLayer.append`.
        """
        if self.call is None or self.call.alpha.shape != k.shape[:3]:
            raise ValueError(self.lacks_decisions)
        self._check(k, v)
        store, start, alpha, is_real = self.store, self.tokens_seen, self.call.alpha, self.call.is_real
        store.dtype, store.head_dim = k.dtype, k.shape[-1]
        self.tokens_seen += k.shape[2]
        if k.shape[2] == 1:
            store.place(k, v, alpha[..., 0], None if is_real is None else is_real[:, 0], start)
            if not self.all_begun:
                self.all_begun = is_real is None or bool(store.has_begun.all())
        else:
            self.held = store.held(start, alpha[..., 0])
            self.seen_until = expiry(alpha, is_real, start, self.call.settings.delay)
        return KVView(self, k, v, is_prefill=False)

    @property
    def lacks_decisions(self) -> str:
        return (
            f"layer {self.layer_idx}: {type(self._policy).__name__} goes by the decisions of a retrofitted model, "
            "and this one makes none; trainers/train_dmc.py retrofits a model, hf_kvcache.dmc.load loads one"
        )

    def note_padding(self, mask, n_new: int) -> None:
        """The hooks have."""

    @torch.no_grad()
    def settle(self, q, view, scaling=None, softcap=None) -> None:
        """Let rows go that nothing will see again, once attention has read them."""
        self._end_gradients(view)
        if self.seen_until is not None:
            start, held = self.tokens_seen - view.n_new, self.held
            self.store.commit(view.new_k, view.new_v, self.seen_until, None if held is None else held[2], start)
            self.all_begun = self.all_begun or self.call.is_real is None or bool(self.store.has_begun.all())
        self.call = self.held = self.seen_until = None

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        raise ValueError(
            f"{type(self._policy).__name__} cannot take tokens back, which speculative decoding asks for: merged and "
            "overwritten rows are gone; generate without an assistant"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"cannot crop: {type(self._policy).__name__} has merged or overwritten rows of earlier tokens; "
                "copy.deepcopy(cache) before what may have to be taken back"
            )

    def _map_batch(self, change) -> None:
        super()._map_batch(change)
        if self.store.packed.table is not None:
            self.batch_size = self.store.packed.table.shape[0]

    def restored(self) -> None:
        """A saved layer has got its tensors back."""
        if self.is_initialized:
            self.store.head_dim = self.head_dim
            self.all_begun = bool(self.store.has_begun.all())


def layer_class(policy) -> type[KVLayer]:
    """The layer that a policy goes with."""
    return SlotLayer if isinstance(policy, Learned) else KVLayer


def layer_of(cache, attention: torch.nn.Module, settings: Settings) -> SlotLayer | None:
    """The layer of a cache that takes the rows of a retrofitted attention module; None without a cache.

    One of transformers' own is let pass as long as it is empty, because models make one whether it is used or not.

    Raises:
        ValueError: the cache is for something else.
    """
    if cache is None:
        return None
    policy = getattr(cache, "policy", None)
    if not isinstance(policy, Learned):
        if hasattr(cache, "policy") or cache.get_seq_length(attention.layer_idx):
            kind = "DMCCache" if settings.merges else "DMSCache"
            raise ValueError(
                f"layer {attention.layer_idx}: the model was retrofitted for {settings.method.upper()}, and its rows "
                f"cannot go on in a {type(cache).__name__}; use past_key_values={kind}()"
            )
        return None
    if policy.method != settings.method:
        raise ValueError(
            f"layer {attention.layer_idx}: the model was retrofitted for {settings.method.upper()}, the cache is for "
            f"{policy.method.upper()}"
        )
    return cache.layer_for(attention)
