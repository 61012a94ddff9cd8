"""Huge pages for large CPU tensors: a decode step reads the whole cache once, and with pages of 4 KiB it waits for
their addresses as much as for the data.
"""

from __future__ import annotations

import ctypes
import sys

import torch

HUGE_PAGE = 1 << 21
_ADVICE = 14  # MADV_HUGEPAGE of Linux


def _load_madvise():
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


_madvise = _load_madvise()


def on_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """Ask the system to back a fresh tensor, not yet written to, with huge pages; returns the tensor.

    Only whole huge pages inside the tensor are asked for, so no byte outside it becomes resident. Where the system
    does not offer them nothing happens.
    """
    n_bytes = t.numel() * t.element_size()
    if _madvise is not None and t.device.type == "cpu" and n_bytes >= 2 * HUGE_PAGE:
        start = -(-t.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (t.data_ptr() + n_bytes) // HUGE_PAGE * HUGE_PAGE
        _madvise(start, stop - start, _ADVICE)
    return t
