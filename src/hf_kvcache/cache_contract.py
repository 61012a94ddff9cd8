"""What transformers asks of a cache, beside `update`: masks, crops, batches, states of linear attention."""

from __future__ import annotations

import torch
from transformers import Cache

from hf_kvcache.batch import batch_indices
from hf_kvcache.layer_contract import LayerContract


class CacheContract(Cache):
    """Operations over all layers: all of them, or none changes."""

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back what comes: while speculative decoding records, eviction waits for it."""
        return all(layer.is_croppable for layer in self.layers)

    def get_mask_sizes(self, query_length: int, *args, **kwargs) -> tuple[int, int]:
        if query_length == 0:
            # asked before any layer runs: the model's own reshape would fail with a riddle
            raise ValueError("the input is empty; a forward pass needs at least one token")
        return super().get_mask_sizes(query_length, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let layers wait for `crop` before they evict or pack: speculative decoding begins.

        Raises:
            ValueError: the decisions of a retrofitted model cannot be taken back.
        """
        if self.policy is not None:
            self.policy.check_recording()
        # layers are created as they are needed, so the flag must outlive this call
        self._records_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in all layers, or raise and change none.

        Raises:
            ValueError: a layer has evicted tokens among them, or the number is positive.
        """
        ours = [layer for layer in self.layers if isinstance(layer, LayerContract)]
        for layer in ours:
            layer.check_crop(tokens_to_remove)
        theirs = {i: layer for i, layer in enumerate(self.layers) if not isinstance(layer, LayerContract)}
        if theirs:
            from hf_kvcache.hf_layers import crop_all

            crop_all(theirs, tokens_to_remove)
        for layer in ours:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let every row of the batch go on from row `beam_idx` `[B]` of it: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Keep these rows of the batch, in this order, in all layers or in none.

        Args:
            indices: integers, `[B']` as a tensor, list or tuple; or a boolean mask `[B]`.

        Raises:
            IndexError: the cache has no such row.
            TypeError: something else than integers or a mask.
        """
        indices = batch_indices(indices, self.batch_size)
        for layer in self.layers:
            # transformers' own layers of linear attention have no other name for it
            layer.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies side by side.

        Raises:
            ValueError: `repeats` is no positive number.
        """
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: every row has to stay at least once")
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token.

        Raises:
            ValueError: layers differ in it.
        """
        sizes = {_batch_size(layer) for layer in self.layers} - {-1}
        if len(sizes) > 1:
            raise ValueError(f"layers hold batches of {' and '.join(map(str, sorted(sizes)))} rows")
        return next(iter(sizes), -1)

    def reset(self) -> None:
        """Forget every token in all layers; the bytes are freed."""
        self.handed = None
        super().reset()
        for layer in self.layers:
            if not isinstance(layer, LayerContract):
                from hf_kvcache.hf_layers import drop_rows

                drop_rows(layer)
        self.rebind()

    def has_previous_state(self, layer_idx: int | None = None, *args, **kwargs) -> bool:
        self._check_layers()
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, *args, **kwargs):
        self._check_layers()
        return super().get_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args, **kwargs):
        self._check_layers()
        return super().get_recurrent_state(*args, **kwargs)

    def update_conv_state(self, *args, **kwargs):
        self._check_layers()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs):
        self._check_layers()
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, *args, **kwargs):
        self._check_layers()
        return super().update_indexer(*args, **kwargs)

    def _check_layers(self) -> None:
        """Models with layers of linear attention, or of indexed attention, ask for those before attention is called.

        Raises:
            ValueError: the layers are not known yet.
        """
        if self._hf_layers is None:
            raise ValueError(self._lacks_config)
        while len(self.layers) < len(self._hf_layers):
            self.layers.append(self._new_layer(len(self.layers)))

    @property
    def _lacks_config(self) -> str:
        return (
            "this model has layers of linear or indexed attention, whose states belong to the cache from the start: "
            f"construct {type(self).__name__}(..., config=model.config)"
        )


def _batch_size(layer) -> int:
    """Rows of the batch that a layer holds; -1 before the first token."""
    if isinstance(layer, LayerContract):
        return layer.batch_size if layer.is_initialized else -1
    from hf_kvcache.hf_layers import batch_size_of

    return batch_size_of(layer)
