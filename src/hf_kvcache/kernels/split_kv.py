"""What split-KV decode attention is made of, whatever a row is: launch geometry, masks, online softmax.

Tiles are `[NB, NR, ...]`: each warp owns one of `NB` lanes with `NR` rows of the cache, its own online softmax and its
own accumulator, so that warps meet only once, after the loop. Rows of the cache are the M rows of the tensor-core
product and queries its N columns, because a decode step has few queries and 8 columns waste less than 16 rows.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.merge_states.triton_kernel import merge_partials

BLOCK_M = 8  # query rows per program: the narrowest tensor-core tile
STEP = 128  # splits are whole multiples of the rows any kernel takes per iteration
MIN_SPLIT = 256  # rows below which a split costs more in partial results than it gains
PROGRAMS_PER_SM = 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


def unavailable(device) -> str | None:
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, these are on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def size_obstacle(q, v_width) -> str | None:
    """Why no kernel takes these queries beside values of `v_width` channels, or None."""
    if max(q.shape[-1], v_width) > 256:
        return f"head size {max(q.shape[-1], v_width)} is above 256"
    if q.dtype == torch.float32 and not INTERPRETED:
        return "float32 products do not fit the registers (the interpreter runs them, for tests)"
    return None


class Partials:
    """Workspace of split attention: normalised outputs and log-sum-exp of every split, in float32.

    Args:
        q: queries `[B, Hq, S, D]`.
        n_kv_heads: `Hkv`.
        width: channels of a value row.
        lengths: rows of each part of the cache (packed, tail); a part gets splits in proportion to the work it is.
    """

    def __init__(self, q, n_kv_heads, width, lengths):
        self.q = q
        B, Hq, S, _ = q.shape
        self.n_rows = Hq // n_kv_heads * S
        self.n_blocks = triton.cdiv(self.n_rows, BLOCK_M)
        wanted = max(1, n_programs(q.device) // (B * n_kv_heads * self.n_blocks))
        self.rows_per_split = [_rows_per_split(n, wanted) for n in lengths]
        self.n_splits = [triton.cdiv(n, rows) for n, rows in zip(lengths, self.rows_per_split)]
        n_partials = sum(self.n_splits)
        self.out = torch.empty(n_partials, B * Hq * S, width, device=q.device, dtype=torch.float32)
        self.lse = torch.empty(n_partials, B * Hq * S, device=q.device, dtype=torch.float32)

    def part(self, index):
        """Workspace slices, grid prefix and rows per split of one part."""
        first = sum(self.n_splits[:index])
        rows = slice(first, first + self.n_splits[index])
        return self.out[rows], self.lse[rows], (self.n_blocks, self.n_splits[index]), self.rows_per_split[index]

    def merged(self):
        return merge_partials(self.out, self.lse, self.q)


def n_programs(device):
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM


def _rows_per_split(n_rows, n_splits):
    rows = triton.cdiv(n_rows, n_splits)
    return max(triton.cdiv(rows, STEP) * STEP, MIN_SPLIT)


def row_contiguous(x, width):
    """`x` itself unless its rows are not adjacent (stores keep them so)."""
    return x if x.stride(3) == 1 and x.stride(2) == width else x.contiguous()


def stride_unit(*tensors):
    """8 where batch and head strides are multiples of 8 elements, so that the kernel knows its loads are aligned."""
    return 8 if all(s % 8 == 0 for x in tensors for s in x.stride()[:2]) else 1


def mask_mode(mask, S):
    """0 no mask, 1 one mask row for all query rows of a head, 2 a row per query."""
    return 0 if mask is None else 1 if S == 1 else 2


def mask_strides(mask):
    """Strides over batch, head, query and key; 0 where the mask is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


@triton.jit
def visible_rows(mask, i_n, o_t, o_s, b_left, stride_s, stride_n, MASK: tl.constexpr):
    """Which of the rows `i_n + o_t` each query may see: bool `[NB, NR, BM]` or `[NB, NR, 1]`."""
    m_t = o_t < b_left
    p_mask = mask + (i_n + o_t) * stride_n
    if MASK == 1:
        m_t = m_t & (tl.load(p_mask, mask=m_t, other=0) != 0)
    b_visible = m_t[:, :, None]
    if MASK == 2:
        p_mask = p_mask[:, :, None] + (o_s.to(tl.int64) * stride_s)[None, None, :]
        b_visible = b_visible & (tl.load(p_mask, mask=b_visible & (o_s >= 0)[None, None, :], other=0) != 0)
    return b_visible


@triton.jit
def capped(b_s, softcap, CAP: tl.constexpr):
    """Scores in units of log2, after `softcap * tanh(s / softcap)` where asked for."""
    if CAP:
        b_s = softcap * (2.0 * tl.sigmoid(2.0 * b_s / softcap) - 1.0)
    return b_s * LOG2E


@triton.jit
def fold_rows(b_x):
    """Sum `[NB, NR, BM]` to `[NB, 8, BM]`: the part of a row sum that stays inside a thread's registers."""
    return tl.sum(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 8, 8, b_x.shape[2])), 1)


@triton.jit
def softmax_step(b_s, b_m, b_l):
    """One step of the online softmax per lane: weights, new maximum, new sum, and the factor on what was summed."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))  # [NB, BM]
    # a lane that has seen nothing yet keeps -inf: subtract 0 there, not -inf - -inf
    b_base = tl.where(b_m_new == NEG_INF, 0.0, b_m_new)
    b_carry = tl.exp2(b_m - b_base)
    b_p = tl.exp2(b_s - b_base[:, None, :])
    b_l = b_l * b_carry[:, None, :] + fold_rows(b_p)
    return b_p, b_m_new, b_l, b_carry


@triton.jit
def lane_shares(b_m, b_l):
    """Weight of every lane in the merged result `[NB, BM]`, and its natural log-sum-exp `[BM]`."""
    b_top = tl.max(b_m, 0)
    b_base = tl.where(b_top == NEG_INF, 0.0, b_top)
    b_share = tl.exp2(b_m - b_base[None, :])
    b_total = tl.sum(tl.sum(b_l, 1) * b_share, 0)
    b_seen = tl.where(b_total > 0, b_total, 1.0)
    b_lse = tl.where(b_total > 0, b_base / LOG2E + tl.log(b_seen), NEG_INF)
    return b_share / b_seen[None, :], b_lse
