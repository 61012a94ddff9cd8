"""Which rows a query may see, as an object that waits until the layer says what it has kept."""

from __future__ import annotations

import torch

from hf_kvcache.compat import causal_mask_function, sdpa_mask


class KVMask:
    """The mask of one forward pass under `attn_implementation="hf_kvcache"`.

    transformers builds one mask and shares it among layers, but layers and heads may keep different rows. So the mask
    function hands this object through: layers that keep everything ask for the dense mask, layers that evict build
    theirs from the positions of their rows and the padding recorded here.
    """

    # `generate` builds the mask of a compileable cache before the forward pass, which asks for its dimensions
    ndim = 4

    def __init__(self, batch_size, q_length, kv_length, q_offset=0, attention_mask=None, **kwargs):
        self.padding = attention_mask  # bool [B, T], True for real tokens, or None
        self.is_causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        self.n_rows = kv_length
        arguments = kwargs | {
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
        }
        # some caches count in tensors that the layer updates in place before the mask is asked for
        counts = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        self._arguments = arguments | counts | {"attention_mask": attention_mask}
        self._dense: list[torch.Tensor | None] = []
        self._moved: dict[torch.device, KVMask] = {}

    def to(self, device, non_blocking: bool = False) -> KVMask:
        """The same on another device: accelerate asks for it where layers lie on several (`device_map`)."""
        device = torch.device(device)
        if device not in self._moved:
            self._moved[device] = _Moved(self, device)
        return self._moved[device]

    def dense(self) -> torch.Tensor | None:
        """The boolean mask `[B, 1, S, N]` that sdpa would get, or None where it needs none."""
        if not self._dense:
            self._dense.append(sdpa_mask(**self._arguments))
        return self._dense[0]

    def of_all_tokens(self, tokens_seen: int, n_new: int, device: torch.device) -> torch.Tensor | None:
        """The mask of a layer that keeps everything, where the shared one is of a layer that does not."""
        if self.padding is None and n_new == 1:
            return None
        mask = causal(tokens_seen, n_new, device)
        return mask if self.padding is None else mask & self.padding[:, None, None, :tokens_seen]

    def contiguous(self) -> KVMask:
        """Tensors are asked for this by `prepare_inputs_for_generation`."""
        return self


class _Moved(KVMask):
    """A mask on another device than the one that it was made on, moved once for all layers there."""

    def __init__(self, mask: KVMask, device: torch.device):
        vars(self).update(vars(mask), _dense=[])
        self._made, self._device = mask, device
        self.padding = None if mask.padding is None else mask.padding.to(device)

    def dense(self) -> torch.Tensor | None:
        if not self._dense:
            dense = self._made.dense()
            self._dense.append(None if dense is None else dense.to(self._device))
        return self._dense[0]


def resolve(view, mask, n_new: int) -> torch.Tensor | None:
    """The boolean mask of this call, `[B | 1, Hkv | 1, S, N]` in view order, or None when everything is visible.

    Args:
        view: the `KVView` of the layer.
        mask: what transformers handed over: a `KVMask`, a boolean or additive tensor `[B, 1, S, N]`, or None.
        n_new: `S`, the queries of this call.

    Raises:
        ValueError: a tensor mask that does not fit the rows of this layer.
    """
    layer = view.layer
    has_gaps = layer.store.is_ragged and layer.store.n_packed
    has_evicted = layer.policy is not None and view.n_kept < view.tokens_seen
    if has_gaps or (has_evicted and layer.has_padding):
        return visible(view.positions, view.tokens_seen, n_new)
    if has_evicted:
        # whatever has gone, the rows left are older than the new ones, which stand at the end
        return None if n_new == 1 else causal(view.n_kept, n_new, view.device)
    if isinstance(mask, KVMask):
        fits = mask.n_rows == view.n_kept
        dense = mask.dense() if fits else mask.of_all_tokens(view.tokens_seen, n_new, view.device)
    else:
        dense = as_boolean(mask)
    if dense is None:
        return None if n_new == 1 else causal(view.n_kept, n_new, view.device)
    if dense.shape[-1] != view.n_kept:
        raise ValueError(
            f"the attention mask covers {dense.shape[-1]} rows, layer {layer.layer_idx} keeps {view.n_kept}; "
            'load the model with attn_implementation="hf_kvcache", which builds masks per layer'
        )
    return layer.store.to_view_order(dense)


def visible(positions: torch.Tensor, tokens_seen: int, n_new: int) -> torch.Tensor:
    """Causal mask from positions `[B, Hkv, N]` (-1 is never seen): boolean `[B, Hkv, S, N]`."""
    queries = torch.arange(tokens_seen - n_new, tokens_seen, device=positions.device)
    rows = positions.unsqueeze(2)
    return (rows >= 0) & (rows <= queries.view(-1, 1))


def causal(n_rows: int, n_new: int, device: torch.device) -> torch.Tensor:
    """Causal mask for the last `n_new` of `n_rows` rows: boolean `[1, 1, S, N]`."""
    return torch.ones(n_new, n_rows, dtype=torch.bool, device=device).tril(n_rows - n_new)[None, None]


def new_token_padding(mask, n_new: int, tokens_seen: int) -> torch.Tensor | None:
    """Which of the new tokens are real, boolean `[B, S]`; None when all are."""
    if mask is not None and not isinstance(mask, (KVMask, torch.Tensor)):
        raise ValueError(
            f"a {type(mask).__name__} does not say which tokens are padding, which this cache needs to know; "
            'load the model with attn_implementation="hf_kvcache"'
        )
    if isinstance(mask, KVMask):
        return None if mask.padding is None else mask.padding[:, tokens_seen - n_new : tokens_seen]
    if mask is not None and mask.dim() == 2:
        # flash attention gets the padding itself
        return mask[:, -n_new:].bool()
    mask = as_boolean(mask)
    return None if mask is None else mask[:, 0, -1, -n_new:]


def as_boolean(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask tensor as boolean, True = visible; additive masks hold zero or a huge negative number."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def as_additive(mask: torch.Tensor | None, n_rows: int, n_new: int, like: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as the additive one that eager attention expects, causal where none is given."""
    if mask is None:
        if n_new == 1:
            return None
        mask = causal(n_rows, n_new, like.device)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)
