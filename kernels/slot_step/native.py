"""The row of a decoded token on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native

# on CPUs rows are put where the op says by a store; in one call only the reference does
from hf_kvcache.kernels.slot_step.reference import place_rows as place_rows

_CALL = struct.Struct("16q")


def unavailable(device) -> str | None:
    return native.unavailable("slot_step", device)


def slot_step(alpha, is_real, pending, lengths, position):
    (B, H), n_cells, apart = alpha.shape, pending.shape[2], pending.stride(2)
    slot = torch.empty(B, H, dtype=torch.int32)
    real = (0, 0) if is_real is None else (is_real.data_ptr(), is_real.stride(0))
    fields = (
        alpha.data_ptr(), *alpha.stride(), *real, pending.data_ptr(), *pending.stride()[:2],
        lengths.data_ptr(), *lengths.stride(), slot.data_ptr(),
        (position - 1) % n_cells * apart, position % n_cells * apart, B, H,
    )  # fmt: skip
    native.functions["slot_step"](_CALL.pack(*fields))
    return slot
