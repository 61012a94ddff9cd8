"""What a running forward pass says of the positions of its tokens."""

from __future__ import annotations

import inspect

import torch

from hf_kvcache.rope import Rope

UNSEEN = object()
OTHERWISE = 'LowRank(rope="post") does without'


def embeddings_given(module: torch.nn.Module):
    """The `position_embeddings` that the running forward pass of `module` was given; `UNSEEN` if none is running."""
    frame = frame_of(module)
    return UNSEEN if frame is None else frame.f_locals["position_embeddings"]


def frame_of(module: torch.nn.Module):
    """The frame of the running forward pass of `module`, which takes `position_embeddings`; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        is_given = "position_embeddings" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if is_given and frame.f_locals.get("self") is module:
            return frame
        frame = frame.f_back
    return None


def refuse_images(module: torch.nn.Module, ropes, is_real: torch.Tensor | None) -> None:
    """Raise if the running call has tokens whose positions do not count tokens, as those of images.

    Args:
        module: the attention module, whose forward pass is running.
        ropes: those of its layer.
        is_real: which of the tokens are not padding, `[B, S]`; None means all.

    Raises:
        ValueError: there are some, or it cannot be seen.
    """
    for rope in ropes:
        found = steps(embeddings_given(module), rope)
        if found is None:
            raise ValueError(
                f"layer {module.layer_idx}: positions may be those of images, and what the model made of them cannot "
                f"be seen (is it compiled?); {OTHERWISE}, and so do caches without rerotate_keys=True"
            )
        if is_real is not None:
            found |= ~(is_real[:, 1:] & is_real[:, :-1]).to(found.device)
        if not found.all():
            raise ValueError(
                f"layer {module.layer_idx}: the positions of an image or a video do not count tokens, so keys and "
                f"queries cannot be rotated by them; {OTHERWISE}, and so do other policies without rerotate_keys=True"
            )


def steps(given, rope: Rope) -> torch.Tensor | None:
    """Whether a token stands one position behind the one before it, on all axes, boolean `[B, S - 1]`.

    None where what was given is not understood.
    """
    half = rope.inv_freq.shape[0]
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2
    if not is_pair or not all(isinstance(x, torch.Tensor) and x.shape[-1] in (half, 2 * half) for x in given):
        return None
    # tables are rounded to the dtype of the model
    tolerance = 1e-2 if given[0].dtype == torch.float32 else 4e-2
    cos, sin = (x[..., :half].float() / rope.scaling for x in given)
    back, front = slice(None, -1), slice(1, None)
    cosine = cos[..., front, :] * cos[..., back, :] + sin[..., front, :] * sin[..., back, :]
    sine = sin[..., front, :] * cos[..., back, :] - cos[..., front, :] * sin[..., back, :]
    angle = rope.inv_freq.to(cos.device, torch.float32)
    is_step = ((cosine - angle.cos()).abs() < tolerance) & ((sine - angle.sin()).abs() < tolerance)
    is_step = is_step.all(-1)
    return is_step if is_step.dim() == 2 else is_step.flatten(0, -3).all(0)


def goes_by(given, rope: Rope) -> bool:
    """Whether the call's own embeddings advance by the angles of `rope`, as far as there is anything to see."""
    found = steps(given, rope)
    # images and padding stand elsewhere: one step between neighbours is enough
    return found is None or not found.numel() or bool(found.any()) or _stands_still(given)


def _stands_still(given) -> bool:
    """Whether all tokens of the call have one position: embeddings `[..., S, R]` that are the same for all of them."""
    return all(bool((x[..., 1:, :] == x[..., :-1, :]).all()) for x in given)
