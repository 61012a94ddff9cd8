"""What a mask says of a text whose rows are merged or dropped: where it begins, and nothing else."""

from __future__ import annotations

import threading
import weakref

import torch

from hf_kvcache.attention.mask import KVMask, as_boolean


class _Newest(threading.local):
    """The answer to the newest question of a thread: layers share their mask, and a GPU is waited for once."""

    def __init__(self):
        self.mask = lambda: None
        self.key = self.found = None


_newest = _Newest()


def first_tokens(mask, n_new: int, tokens_seen: int) -> torch.Tensor | None:
    """Position of every row's first token that is no padding, int64 `[B | 1]` on the CPU; None when no row is padded.

    A row that is all padding so far begins at `tokens_seen`.

    Args:
        mask: what the attention module got: a `KVMask`, a tensor `[B, T]` or `[B, H, S, T]` (boolean, or additive), or
            None.
        n_new: `S`, the queries of this call.
        tokens_seen: `T`, those of this call included.

    Raises:
        ValueError: the mask does not cover `T` tokens, or says something else than that a text is causal and padded on
            the left.
    """
    if mask is None or (isinstance(mask, KVMask) and mask.padding is None and mask.is_causal):
        return None
    if not isinstance(mask, (KVMask, torch.Tensor)):
        raise ValueError(
            f"a {type(mask).__name__} does not say which tokens are padding, which this cache needs to know; "
            'load the model with attn_implementation="hf_kvcache"'
        )
    key = n_new, tokens_seen, _version(mask)
    if _newest.mask() is not mask or _newest.key != key:
        found = _read(mask, n_new, tokens_seen)
        _newest.mask, _newest.key, _newest.found = weakref.ref(mask), key, found
    return _newest.found


def _version(mask) -> int:
    """What changes when a mask is written to."""
    return mask._version if isinstance(mask, torch.Tensor) and not mask.is_inference() else 0


def _read(mask, n_new, tokens_seen):
    if isinstance(mask, KVMask):
        mask = mask.padding if mask.is_causal else mask.dense()
    n_columns = mask.shape[-1]
    # the mask of a whole batch may be there before its last tokens are
    if n_columns < tokens_seen or (mask.dim() == 4 and n_columns != tokens_seen) or mask.dim() not in (2, 4):
        raise ValueError(
            f"the attention mask {list(mask.shape)} must cover the {tokens_seen} tokens seen, those that came before "
            "among them"
        )
    read = _of_text if mask.dim() == 2 else _of_queries
    first, is_other = read(mask, n_new, tokens_seen)
    # one look for all that is asked
    *first, is_other = torch.cat([first, is_other.long().view(1)]).tolist()
    if is_other:
        raise ValueError(
            "the attention mask hides tokens behind the first one of a row, or is not causal: rows are made of "
            "neighbours and have no positions, so a retrofitted model reads one text per row; pad on the left, before "
            "the first token"
        )
    return torch.tensor(first) if any(first) else None


def _of_text(mask, n_new, tokens_seen):
    """First tokens by `[B, T]`, and whether the mask says more than them."""
    is_real = mask[:, :tokens_seen].bool()
    first = _first(is_real)
    return first, (is_real != (_range(0, tokens_seen, mask) >= first.unsqueeze(-1))).any()


def _of_queries(mask, n_new, tokens_seen):
    """First tokens by what queries see, `[B, H, S, T]`, and whether the mask says more than them and the order."""
    is_seen = as_boolean(mask)
    # the newest query sees all tokens that are real, if there are any
    first = _first(is_seen[:, 0, -1])
    row, query = _range(0, tokens_seen, mask), _range(tokens_seen - n_new, tokens_seen, mask).unsqueeze(-1)
    begin = first.view(-1, 1, 1, 1)
    # what padding sees is nobody's business
    is_other = ((is_seen != ((row <= query) & (row >= begin))) & (query >= begin)).any()
    if mask.dtype != torch.bool:
        # a bias would be lost
        is_other = is_other | (is_seen & (mask != 0)).any()
    return first, is_other


def _first(is_real):
    n_tokens = is_real.shape[-1]
    return torch.where(is_real.any(-1), is_real.int().argmax(-1), n_tokens)


def _range(start, stop, like):
    return torch.arange(start, stop, device=like.device)
