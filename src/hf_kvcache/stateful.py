"""Layers that have linear attention beside full attention: transformers keeps the states, we keep the rows."""

from __future__ import annotations

from hf_kvcache import compat
from hf_kvcache.compat import LinearAttentionLayer
from hf_kvcache.layer import KVLayer


class StatefulLayer(LinearAttentionLayer, KVLayer):
    """A `KVLayer` with the convolution and recurrent states of the same layer (Falcon-H1, Zamba 2).

    Args:
        n_states: states of each kind.
        other arguments: see `KVLayer`.
    """

    is_compileable = False

    def __init__(self, *args, n_states: int = 1, **options):
        # first, because it forgets device and dtype
        LinearAttentionLayer.__init__(self, number_of_states=n_states)
        KVLayer.__init__(self, *args, **options)

    def lazy_initialization(self, *args, **kwargs) -> None:
        # rows come as two positional arguments, states by name
        kind = LinearAttentionLayer if kwargs else KVLayer
        kind.lazy_initialization(self, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:
        return KVLayer.is_croppable.fget(self) and LinearAttentionLayer.is_croppable.fget(self)

    def check_crop(self, tokens_to_remove: int) -> None:
        KVLayer.check_crop(self, tokens_to_remove)
        if not self.record_past:
            raise ValueError(
                f"layer {self.layer_idx}: states of linear attention cannot be taken back unless they were recorded; "
                "call activate_past_recording() before"
            )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        KVLayer.reset(self)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        KVLayer.activate_past_recording(self)

    def batch_select_indices(self, indices) -> None:
        KVLayer.batch_select_indices(self, indices)
        LinearAttentionLayer.reorder_cache(self, indices)

    def reorder_cache(self, beam_idx) -> None:
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        KVLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        KVLayer.prefetch(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, see `KVLayer`, and of the states."""
        return KVLayer.nbytes.fget(self) + compat.stock_nbytes(self)

    @property
    def nbytes_dense(self) -> int:
        """Bytes of a dense cache of the tokens seen, and of the states, which have no other form."""
        return KVLayer.nbytes_dense.fget(self) + compat.stock_nbytes(self)
