"""Split-KV decode attention over dense rows; the softmax and the launch geometry are shared with `quant_attention`.

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


def obstacle(q, v) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    return size_obstacle(q, v.shape[-1])


def size_obstacle(q, v_width) -> str | None:
    """Why no kernel takes these queries beside values of `v_width` channels, or None."""
    if max(q.shape[-1], v_width) > 256:
        return f"head size {max(q.shape[-1], v_width)} is above 256"
    if q.dtype == torch.float32 and not INTERPRETED:
        return "float32 products do not fit the registers (the interpreter runs them, for tests)"
    return None


def dense_attention(q, k, v, *, scaling, mask=None, softcap=None):
    partials = Partials(q, k.shape[1], v.shape[3], [k.shape[2]])
    attend_dense(partials, 0, q, k, v, scaling=scaling, mask=mask, softcap=softcap)
    return partials.merged()


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
        wanted = max(1, _n_programs(q.device) // (B * n_kv_heads * self.n_blocks))
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


def _n_programs(device):
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM


def _rows_per_split(n_rows, n_splits):
    rows = triton.cdiv(n_rows, n_splits)
    return max(triton.cdiv(rows, STEP) * STEP, MIN_SPLIT)


def attend_dense(partials, index, q, k, v, *, scaling, mask, softcap):
    """Fill part `index` of `partials` with attention over dense rows."""
    (B, _, S, D), DV = q.shape, v.shape[3]
    Hkv, N = k.shape[1:3]
    if N == 0:
        return
    out, lse, grid, rows_per_split = partials.part(index)
    k, v = row_contiguous(k, D), row_contiguous(v, DV)
    q = q if q.stride(3) == 1 else q.contiguous()
    unit = stride_unit(k, v)
    dense_attention_fwd_kernel[(*grid, B * Hkv)](
        q, k, v, q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, partials.n_rows, Hkv,
        *q.stride()[:3],
        *(s // unit for s in (*k.stride()[:2], *v.stride()[:2])),
        *mask_strides(mask),
        UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None, **dense_config(D, q.element_size(), DV),
    )  # fmt: skip


def dense_config(D, itemsize, DV=None):
    """Compile-time constants of the kernel for keys of `D` channels and values of `DV` (None: as many)."""
    DV = D if DV is None else DV
    DP, DVP = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    row = max(DP, DVP) * itemsize
    # chosen by what does not spill (hf_kvcache.kernels.aot); padding 80 channels to 128 costs the most registers
    padded = (DP > D or DVP > DV) and row >= 256
    return {
        "D": D, "DP": DP, "DV": DV, "DVP": DVP, "BM": BLOCK_M, "NB": 4, "NR": 32 if row < 256 or padded else 16,
        "num_warps": 8 if row > 256 else 4, "num_stages": 3 if row <= 256 and not padded else 2,
        "enable_fp_fusion": True,
    }  # fmt: skip


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


@triton.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv",
                               "sq_b", "sq_h", "sq_s", "sk_b", "sk_h", "sv_b", "sv_h",
                               "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def dense_attention_fwd_kernel(
    q, k, v, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv,
    sq_b, sq_h, sq_s, sk_b, sk_h, sv_b, sv_h, sm_b, sm_h, sm_s, sm_n,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
    NB: tl.constexpr, NR: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, DP)
    m_m, m_d = o_m < n_rows, o_d < D
    o_v = tl.arange(0, DVP)
    m_v = o_v < DV
    o_s = o_m % S
    o_t = tl.arange(0, NB)[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]

    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + o_s.to(tl.int64) * sq_s
    b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_d[:, None] & m_m[None, :], other=0.0)  # [DP, BM]
    k += (i_b * sk_b + i_h * sk_h) * UNIT
    v += (i_b * sv_b + i_h * sv_h) * UNIT
    mask += i_b * sm_b + i_h * sm_h

    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)
    b_o = tl.zeros((NB, DVP, BM), tl.float32)
    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    for i_n in tl.range(start, stop, NB * NR):
        b_left = (stop - i_n).to(tl.int32)
        m_t = o_t < b_left
        p_k = k + i_n * D + (o_t[:, :, None] * D + o_d[None, None, :])
        p_v = v + i_n * DV + (o_t[:, None, :] * DV + o_v[None, :, None])
        b_k = tl.load(p_k, mask=m_t[:, :, None] & m_d[None, None, :], other=0.0)  # [NB, NR, DP]
        b_v = tl.load(p_v, mask=m_t[:, None, :] & m_v[None, :, None], other=0.0)  # [NB, DVP, NR]
        b_s = tl.dot(b_k, tl.broadcast_to(b_q[None, :, :], (NB, DP, BM)), input_precision="ieee")  # [NB, NR, BM]
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)
        b_o = tl.dot(b_v, b_p.to(b_v.dtype), b_o * b_carry[:, None, :], input_precision="ieee")

    b_share, b_lse = lane_shares(b_m, b_l)
    o_row = (i_split * tl.num_programs(2) + i_bh) * n_rows + o_m
    b_o = tl.sum(b_o * b_share[:, None, :], 0)  # [DVP, BM]
    tl.store(out + o_row[None, :] * DV + o_v[:, None], b_o, mask=m_v[:, None] & m_m[None, :])
    tl.store(lse + o_row, b_lse, mask=m_m)
