"""What transformers asks of a layer of a cache, beside `update`: sizes, taking tokens back, batches, devices, bytes."""

from __future__ import annotations

import torch

from hf_kvcache.batch import batch_indices
from hf_kvcache.compat import CacheLayerMixin


class ForeignLayerError(AttributeError, ValueError):
    """A model asks its cache for a layer of a kind of its own, which only its config would have told of."""


class LayerContract(CacheLayerMixin):
    """The operations of a layer that go by its store alone; `KVLayer` has what goes by policy and codecs."""

    is_sliding = False
    is_compileable = False

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

    def __getattr__(self, name: str):
        raise ForeignLayerError(
            f"a {type(self).__name__} has no {name!r}; if a model asks for it, the model has cache layers of a kind of "
            "its own: construct the cache with config=model.config"
        )

    def check_ready(self) -> None:
        """Raise ValueError where attention cannot read the rows: called when the attention module is first met."""

    # -- what saving asks --------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """Raise ValueError while a forward pass is under way, whose rows have no place yet."""

    @property
    def described(self) -> dict:
        """What a manifest says of this kind of layer beside what it says of all."""
        return {}

    def restored(self, entry) -> None:
        """A saved layer has got its tensors back; `entry` is what the manifest says of it."""

    # -- what transformers asks --------------------------------------------------------------------------------------

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
            self._should_evict = self._should_evict and self._asks_to_evict()
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
