"""Where in the text a layer's new rows are."""

from __future__ import annotations

import torch


def check_images(layer, call) -> None:
    """Refuse tokens whose positions in RoPE are not those of a text, where keys or queries are rotated by them.

    Raises:
        ValueError: there are some, or the model does not show whether there are.
    """
    ropes = [rope for rope in layer.ropes if rope.is_multimodal]
    if ropes:
        from hf_kvcache.rope_of_call import refuse_images

        refuse_images(call.module, ropes, call.is_real)


def note_positions(layer, call) -> None:
    """Note where in the text the new rows are, for codecs that undo RoPE.

    Raises:
        ValueError: positions of another shape (such as those of images), or padding without positions where keys are
            rotated by them.
    """
    n_new, position_ids = call.n_new, call.position_ids
    rows = layer.store.dense["position_ids"][:, :, -n_new:]
    if not layer.store.needs_positions:
        # which rows are real is all there is to note
        position_ids = None
    elif position_ids is None and layer.rope is not None and layer.rope.is_multimodal:
        # such models show them for prompts alone
        position_ids = call.real_before
    if position_ids is None:
        # a layer without RoPE has nothing to take off, wherever its tokens are
        is_rotated = layer.store.needs_positions and not (layer.is_bound and layer.rope is None)
        is_real = call.is_real if is_rotated else None
        if is_real is not None and not is_real.all():
            raise ValueError(
                f"layer {layer.layer_idx}: the batch is padded, and the model does not say at which positions its "
                'tokens are; use LowRank(rope="post")'
            )
        position_ids = torch.arange(layer.tokens_seen - n_new, layer.tokens_seen, device=rows.device).unsqueeze(0)
    if position_ids.dim() != 2 or position_ids.shape[1] != n_new:
        raise ValueError(
            f"layer {layer.layer_idx}: positions {list(position_ids.shape)} are not [B, {n_new}]; "
            'LowRank(rope="post") does not need them'
        )
    rows.copy_(position_ids.unsqueeze(1))
    # only what is fitted to rows asks which of them are real
    is_real = call.is_real if n_new > 1 and layer.store.is_unfitted else None
    if is_real is not None:
        rows.masked_fill_(~is_real.unsqueeze(1), -1)
    cover(layer, position_ids)


def cover(layer, position_ids: torch.Tensor) -> None:
    """See to it that the rotary tables of a layer reach these positions."""
    if layer.rope is None:
        return
    if position_ids.device.type == "cpu" or position_ids.shape[1] > 1:
        layer.rope_limit = max(layer.rope_limit, int(position_ids.max()) + 1)
    else:
        # asking the device would stall it at every step; text goes on one position after another
        layer.rope_limit += 1
        torch._assert_async((position_ids < layer.rope_limit).all())
    layer.rope.cover(layer.rope_limit, layer.device)
