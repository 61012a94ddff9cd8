"""Layers that have linear attention beside full attention: transformers keeps the states, we keep the rows."""

from __future__ import annotations

from hf_kvcache import hf_layers
from hf_kvcache.compat import LinearAttentionLayer
from hf_kvcache.layer import KVLayer


class StatefulLayer(LinearAttentionLayer, KVLayer):
    """A `KVLayer` with the convolution and recurrent states of the same layer (Falcon-H1, Zamba 2).

    Offloading leaves the states where they are: models read them before they append rows.

    Args:
        n_states: states of each kind.
        other arguments: see `KVLayer`.
    """

    is_compileable = False
    has_states = True

    def __init__(self, *args, n_states: int = 1, **options):
        # first, because it forgets device and dtype
        LinearAttentionLayer.__init__(self, number_of_states=n_states)
        KVLayer.__init__(self, *args, **options)

    def lazy_initialization(self, *args, **kwargs) -> None:
        # rows come as two positional arguments, states by name
        kind = LinearAttentionLayer if kwargs else KVLayer
        kind.lazy_initialization(self, *args, **kwargs)

    @property
    def states(self) -> dict[str, dict]:
        """What transformers keeps of the states, by attribute and by their number, to read and to write."""
        return hf_layers.linear_states(self)

    @property
    def is_croppable(self) -> bool:
        return KVLayer.is_croppable.fget(self) and LinearAttentionLayer.is_croppable.fget(self)

    def check_crop(self, tokens_to_remove: int) -> None:
        KVLayer.check_crop(self, tokens_to_remove)
        if tokens_to_remove:
            hf_layers.check_states_crop(self, f"layer {self.layer_idx}")

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        hf_layers.crop_states(self, tokens_to_remove)
        KVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        hf_layers.drop_states(self)
        KVLayer.reset(self)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        KVLayer.activate_past_recording(self)

    def reorder_cache(self, beam_idx) -> None:
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        KVLayer.offload(self)

    def prefetch(self) -> None:
        KVLayer.prefetch(self)

    def get_max_length(self) -> int:
        return KVLayer.get_max_length(self)

    def _map_batch(self, change) -> None:
        KVLayer._map_batch(self, change)
        for kind in (self.conv_states, self.recurrent_states):
            kind.update({i: change(state) for i, state in kind.items() if state is not None})

    @property
    def _nbytes_of_states(self) -> int:
        held = [state for kind in (self.conv_states, self.recurrent_states) for state in kind.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t is not None}
        return sum(storages.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, see `KVLayer`, and of the states."""
        return KVLayer.nbytes.fget(self) + self._nbytes_of_states

    @property
    def nbytes_dense(self) -> int:
        """Bytes of a dense cache of the tokens seen, and of the states, which have no other form."""
        return KVLayer.nbytes_dense.fget(self) + self._nbytes_of_states
