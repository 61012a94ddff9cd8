"""Keys of rows that move to other positions when their neighbours have gone (`rerotate_keys=True`)."""

from __future__ import annotations

import torch

ORIGINAL = "original"  # keys as they were appended, beside those that have been rotated since
LACKS_ORIGINALS = (
    "the file has no keys as they were appended, which rerotate_keys=True rotates in 16 bits; it is of an earlier "
    "release: make the cache again"
)


def keep_originals(store, dtype: torch.dtype) -> None:
    """Keep keys as they were appended where a key that is rotated again and again would lose its direction.

    Args:
        dtype: of the rows to come.
    """
    if dtype.itemsize < 4:
        store.track(ORIGINAL, dtype)
    elif ORIGINAL in store.tracked:
        # an earlier text was of another dtype
        store.untrack(ORIGINAL)


def state_of_keys(store, k: torch.Tensor, positions: torch.Tensor | int) -> dict[str, torch.Tensor | int]:
    """What is tracked of new keys `k` `[B, Hkv, n, D]`: the positions `[n]` at which they stand, and what they are."""
    return {"angle": positions} | ({ORIGINAL: k.detach()} if ORIGINAL in store.tracked else {})


def close_gaps(layer) -> None:
    """Rotate kept keys so that they stand side by side, the newest one where it was."""
    store, seen = layer.store, layer.tokens_seen
    is_real = store.positions >= 0
    n_after = is_real.flip(-1).cumsum(-1).flip(-1) - 1  # real rows behind a row, of its head
    target = torch.where(is_real, seen - 1 - n_after, 0).int()
    # an original is rotated once, from the position at which it was appended
    source = ORIGINAL if ORIGINAL in store.tracked else "k"
    start = store.positions if source == ORIGINAL else store.state("angle")
    layer.rope.cover(seen, layer.device)
    store.rotate_keys(layer.rope.turn, torch.where(is_real, target - start, 0), source)
    store.set_state("angle", target)
