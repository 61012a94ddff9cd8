"""The definition of the packed integer format, in plain PyTorch (layout: README.md of this folder)."""

from __future__ import annotations

import torch

WORD = 16  # bits of a storage word
# widths of the planes a code is cut into, low bits first
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


def unavailable(device) -> None:
    return None


def quant_pack(x, *, bits, axis, group_size):
    B, H, n, D = x.shape
    if axis == "channel":
        grouped, dim = x.float().unflatten(2, (n // group_size, group_size)), 3  # [B, H, n/32, 32, D]
    else:
        grouped, dim = x.float().unflatten(3, (D // group_size, group_size)), 4  # [B, H, n, D/g, g]
    low, high = grouped.amin(dim), grouped.amax(dim)
    zero = to_half((low + high) / 2)
    centre = (2**bits - 1) / 2
    # the extent is measured from the *rounded* zero point and the scale is rounded up, so that rounding the
    # metadata costs resolution and never clips
    extent = torch.maximum(high - zero.float(), zero.float() - low)
    scale = to_half(extent / centre * (1 + 2**-10))
    step = scale.float().unsqueeze(dim)
    # a constant group has scale 0 and any code decodes to its zero point
    codes = (grouped - zero.float().unsqueeze(dim)) / torch.where(step > 0, step, 1.0) + centre
    codes = codes.round().clamp(0, 2**bits - 1).nan_to_num(0.0).to(torch.int32).reshape(B, H, n, D)
    return pack(codes, bits), scale, zero


def quant_unpack(codes, scale, zero, *, bits, axis, dtype=torch.float32):
    centre = (2**bits - 1) / 2
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = unpack(codes, bits).to(compute) - centre
    scale, zero = scale.to(compute), zero.to(compute)
    if axis == "channel":
        x = x.unflatten(2, (scale.shape[2], -1)) * scale.unsqueeze(3) + zero.unsqueeze(3)
        return x.flatten(2, 3).to(dtype)
    x = x.unflatten(3, (scale.shape[3], -1)) * scale.unsqueeze(4) + zero.unsqueeze(4)
    return x.flatten(3, 4).to(dtype)


def pack(codes, bits):
    """Integers `[..., D]` in `[0, 2**bits)` to int16 words `[..., D * bits / 16]`."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        fields = plane.unflatten(-1, (WORD // width, -1))  # [..., fields, words]
        place = torch.arange(WORD // width, device=codes.device, dtype=torch.int32) * width
        planes.append((fields << place.unsqueeze(-1)).sum(-2, dtype=torch.int32))
        shift += width
    return torch.cat(planes, -1).to(torch.int16)


def unpack(words, bits):
    """Inverse of `pack`: int32 `[..., D]`."""
    D = words.shape[-1] * WORD // bits
    out, start, shift = 0, 0, 0
    for width in PLANES[bits]:
        n_words = D * width // WORD
        plane = words[..., start : start + n_words].to(torch.int32).unsqueeze(-2)  # [..., 1, words]
        place = torch.arange(WORD // width, device=words.device, dtype=torch.int32) * width
        out = out + (((plane >> place.unsqueeze(-1)) & (2**width - 1)).flatten(-2) << shift)
        start, shift = start + n_words, shift + width
    return out


def to_half(x):
    """Round to float16, clamped to its finite range (NaN stays NaN)."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16)
