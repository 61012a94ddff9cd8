"""Which rows a query may see. Masks are about tokens; a layer takes the columns of the rows that it has kept."""

from __future__ import annotations

import torch

from hf_kvcache.compat import causal_mask_function, eager_mask, sdpa_mask
from hf_kvcache.standin import TensorStandIn


class KVMask(TensorStandIn):
    """The mask of one forward pass under `attn_implementation="hf_kvcache"`.

    transformers builds one mask and shares it among layers, but layers and heads may keep different rows. So the mask
    function hands this object through: layers that keep everything ask for the dense mask, layers that evict build
    theirs from the positions of their rows and the padding recorded here. A model that goes on from its mask itself
    (indexers, dynamic masks) finds the dense one.

    Attributes:
        padding: boolean `[B, T]`, True for real tokens, or None.
        n_columns: tokens that it is about.
        is_causal: whether nothing but order and padding decides who sees whom.
        is_of_last: whether its queries are known to be those of the last of these tokens (a cache of fixed size has
            columns for tokens that have not come yet).
    """

    # `generate` builds the mask of a compileable cache before the forward pass, which asks for its dimensions
    ndim = 4

    def __init__(self, batch_size, q_length, kv_length, q_offset=0, attention_mask=None, **kwargs):
        self.padding, self.n_columns = attention_mask, kv_length
        self.is_causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        sizes = q_length, kv_length, q_offset, kwargs.get("kv_offset", 0)
        self.is_of_last = all(isinstance(n, int) for n in sizes) and q_offset + q_length == kv_length + sizes[3]
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
        """This mask on another device: accelerate asks for it where layers lie on several (`device_map`)."""
        if isinstance(device, torch.dtype):
            return self._tensor().to(device)
        device = torch.device(device)
        if device not in self._moved:
            self._moved[device] = _Moved(self, device)
        return self._moved[device]

    def dense(self) -> torch.Tensor | None:
        """The boolean mask `[B, 1, S, T]` that sdpa would get, or None where it needs none."""
        if not self._dense:
            self._dense.append(sdpa_mask(**self._arguments))
        return self._dense[0]

    def of_all_tokens(self) -> KVMask:
        """The mask of a call whose queries are those of all the tokens that this one is about, not of the last ones."""
        return KVMask(**(self._arguments | {"q_length": self.n_columns, "q_offset": 0}))

    def of_first_tokens(self, n: int) -> KVMask:
        """The mask of a call for the first `n` tokens of a text, out of one for a whole prefill."""
        padding = None if self.padding is None else self.padding[:, :n]
        return KVMask(**(self._arguments | {"q_length": n, "kv_length": n, "attention_mask": padding}))

    def _tensor(self) -> torch.Tensor:
        # what eager attention gets, which is what models without another attention reckon with
        return eager_mask(**self._arguments)

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

    def _tensor(self) -> torch.Tensor:
        return self._made._tensor().to(self._device)


def resolve(view, mask, n_new: int) -> torch.Tensor | None:
    """The mask of this call over the rows that a layer holds, or None when everything is visible.

    Args:
        view: the `KVView` of the layer.
        mask: what transformers or the user handed over, about all tokens seen: a `KVMask`, a boolean or additive
            tensor `[B | 1, 1 | Hkv | Hq, S, T]`, or None.
        n_new: `S`, the queries of this call.

    Returns:
        `[B | 1, 1 | Hkv | Hq, S, N]` in view order: boolean, or additive where the mask does more than hide.

    Raises:
        ValueError: a tensor mask that is about another number of tokens.
    """
    layer = view.layer
    has_gaps = layer.store.is_ragged and layer.store.n_packed
    if has_gaps or view.n_kept < view.tokens_seen:
        if has_gaps or layer.has_padding or not is_only_causal(mask):
            from hf_kvcache.attention.kept_columns import mask_of_kept

            return mask_of_kept(view, mask, n_new)
        # whatever has gone, the rows left are older than the new ones, which stand at the end
        return None if n_new == 1 else causal(view.n_kept, n_new, view.device)
    dense = mask.dense() if isinstance(mask, KVMask) else without_bias(mask)
    if dense is None:
        return None if n_new == 1 else causal(view.n_kept, n_new, view.device)
    check_tokens(dense, view)
    return layer.store.to_view_order(dense)


def is_only_causal(mask) -> bool:
    """Whether a mask is known to hide nothing but the future: a tensor would have to be looked at."""
    return mask is None or (isinstance(mask, KVMask) and mask.is_causal and mask.padding is None)


def check_tokens(mask: torch.Tensor, view) -> None:
    """Raise ValueError unless a mask is about the tokens that a layer has seen."""
    if mask.shape[-1] != view.tokens_seen:
        raise ValueError(
            f"the attention mask covers {mask.shape[-1]} tokens, layer {view.layer.layer_idx} has seen "
            f"{view.tokens_seen} (and keeps {view.n_kept}); masks are about all tokens seen, evicted ones included"
        )


def causal(n_rows: int, n_new: int, device: torch.device) -> torch.Tensor:
    """Causal mask for the last `n_new` of `n_rows` rows: boolean `[1, 1, S, N]`."""
    return torch.ones(n_new, n_rows, dtype=torch.bool, device=device).tril(n_rows - n_new)[None, None]


def as_boolean(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask tensor as boolean, True = visible; additive masks hold zero or a huge negative number."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def without_bias(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask tensor as boolean if all that it does is hide; as it is where it also raises or lowers scores."""
    hides_only = as_boolean(mask)
    if hides_only is mask or not (hides_only & (mask != 0)).any():
        return hides_only
    return mask


def as_additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as the additive one that eager attention expects, in the dtype of `like`; others as they are."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)


def for_heads(mask: torch.Tensor | None, n_heads: int) -> torch.Tensor | None:
    """A mask `[B, 1 | Hkv | Hq, S, N]` for an attention function that knows `Hq` query heads only."""
    if mask is None or mask.shape[1] in (1, n_heads):
        return mask
    return mask.repeat_interleave(n_heads // mask.shape[1], 1)
