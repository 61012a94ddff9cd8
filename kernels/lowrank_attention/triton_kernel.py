"""Split-KV decode attention over low-rank latents: which kernels a call takes, and with which constants.

Values are summed as latents, by a second kernel that reads each row once for all the heads that share it; where every
KV head has its own and keys need no rotation, the first kernel does it (README.md).
"""

from __future__ import annotations

import torch
import triton

from hf_kvcache.kernels.lowrank_attention import kv_heads
from hf_kvcache.kernels.lowrank_attention.fwd_kernels import lowrank_attention_fwd_kernel, weighted_latents_fwd_kernel
from hf_kvcache.kernels.merge_states.triton_kernel import merge_partials
from hf_kvcache.kernels.split_kv import (
    INTERPRETED,
    PROGRAMS_PER_SM,
    mask_mode,
    mask_strides,
    row_contiguous,
    stride_unit,
    unavailable,
)
from hf_kvcache.rope import FINE

__all__ = ["lowrank_attention", "obstacle", "unavailable"]

LANES, LANE_ROWS = 4, 16
TILE = LANES * LANE_ROWS  # rows per iteration: the fine rotary table has a row for each
MIN_SPLIT = 512  # rows below which a split costs more in partial results than it gains
FUSED_RANK = 128  # value latents above this rank do not fit beside the keys
KEPT = 128 * 128  # numbers of an expansion that stays in shared memory
MERGE_WIDTH = 512  # channels that one program merges
assert TILE == FINE


def obstacle(q, keys, values, expansion) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    for name, side in (("key", keys), ("value", values)):
        if side.rank % 16:
            return f"{name} latents of rank {side.rank} are not whole multiples of 16"
    if keys.rank > 256:
        return f"key latents of rank {keys.rank} are above 256"
    if q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is above 256"
    if expansion is not None and expansion.tables is None and keys.rank * q.shape[-1] > KEPT:
        return f"an expansion of rank {keys.rank} is too large without positions (absorb it into the queries)"
    if q.dtype == torch.float32 and not INTERPRETED:
        return "float32 products do not fit the registers (the interpreter runs them, for tests)"
    return None


def lowrank_attention(q, keys, values, expansion=None, *, scaling, mask=None, softcap=None):
    B, Hq, S, _ = q.shape
    N, Hkv, n_groups, rank = keys.rows.shape[2], kv_heads(keys, values, expansion), values.rows.shape[1], values.rank
    n_rows = Hq // Hkv * S
    rotated = expansion is not None and expansion.tables is not None
    rows_per_split, n_splits = splits(N, B * Hkv * triton.cdiv(n_rows, query_block(n_rows, rotated)), q.device)
    common = {"scaling": scaling, "mask": mask, "softcap": softcap}
    if n_groups == Hkv and rank <= FUSED_RANK and not rotated:
        out, lse = partials(q, n_splits, rank)
        attend(q, keys, values, expansion, out, lse, rows_per_split, Hkv, **common)
    else:
        # weights of whole tiles, and what they were divided by
        n_tiles = triton.cdiv(N, TILE)
        weights = torch.empty(B * Hq * S, n_tiles * TILE, device=q.device, dtype=q.dtype)
        tops = torch.empty(n_tiles, B * Hq * S, device=q.device, dtype=torch.float32)
        attend(q, keys, None, expansion, weights, tops, rows_per_split, Hkv, **common)
        n_rows = Hq // n_groups * S
        config = value_config(n_rows, side_format(values))
        blocks = triton.cdiv(n_rows, config["BM"]) * value_blocks(config)
        rows_per_split, n_splits = splits(N, B * n_groups * blocks, q.device)
        out, lse = partials(q, n_splits, rank)
        sum_values(weights, tops, values, out, lse, rows_per_split, n_rows, config)
    return merged(out, lse, q)


def splits(n_rows, n_programs, device):
    """Rows per split and number of splits that give the device enough programs, `n_programs` of them per split."""
    n_sms = 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, n_sms * PROGRAMS_PER_SM // n_programs)
    rows = max(triton.cdiv(triton.cdiv(n_rows, wanted), TILE) * TILE, MIN_SPLIT)
    return rows, triton.cdiv(n_rows, rows)


def partials(q, n_splits, rank):
    """Workspace: normalised outputs and log-sum-exp of every split."""
    B, Hq, S, _ = q.shape
    out = torch.empty(n_splits, B * Hq * S, rank, device=q.device, dtype=torch.float32)
    return out, torch.empty(n_splits, B * Hq * S, device=q.device, dtype=torch.float32)


def merged(out, lse, q):
    """Output `[B, Hq, S, r_v]` and log-sum-exp `[B, Hq, S]`; wide rows are merged in pieces."""
    (n_splits, n_rows, rank), (B, Hq, S, _) = out.shape, q.shape
    width = rank if rank <= MERGE_WIDTH else min(rank & -rank, MERGE_WIDTH)
    pieces = rank // width
    like = q.new_empty((), dtype=torch.float32).expand(B, Hq, S * pieces, width)
    lse = lse.repeat_interleave(pieces, 1) if pieces > 1 else lse
    out, lse = merge_partials(out.view(n_splits, n_rows * pieces, width), lse, like)
    return out.view(B, Hq, S, rank), lse[:, :, ::pieces]


def attend(q, keys, fused_values, expansion, out, lse, rows_per_split, Hkv, *, scaling, mask, softcap):
    """Fill the partial results; without `fused_values`, weights and their statistics instead."""
    B, Hq, S, D = q.shape
    N, n_rows = keys.rows.shape[2], Hq // Hkv * S
    if N == 0:
        return
    q = q if q.stride(3) == 1 else q.contiguous()
    k_tensors, v_tensors = side_tensors(keys), side_tensors(keys if fused_values is None else fused_values)
    up, mean, positions, tables = (None,) * 4 if expansion is None else expansion
    up = q if up is None else up if up.stride(2) == 1 else up.contiguous()
    unit = stride_unit(k_tensors[0], v_tensors[0], up)
    # tensors that a call does not have are stood in for
    coarse, fine = (q, q) if tables is None else (x.contiguous() for x in tables)
    places = k_tensors[0] if positions is None else positions if positions.stride(2) == 1 else positions.contiguous()
    v_format = None if fused_values is None else side_format(fused_values)
    rotary = None if expansion is None else 0 if tables is None else 2 * fine.shape[2]
    config = key_config(D, n_rows, side_format(keys), v_format, rotary, mean is not None)
    grid = (triton.cdiv(n_rows, config["BM"]), triton.cdiv(N, rows_per_split), B * Hkv)
    lowrank_attention_fwd_kernel[grid](
        q, *k_tensors, *v_tensors, up, q if mean is None else mean.contiguous(), places, coarse, fine,
        q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, n_rows, Hkv,
        Hkv // keys.rows.shape[1], coarse.shape[1], triton.cdiv(rotary or 0, 2 * config["HC_ANY"]), *q.stride()[:3],
        *side_strides(k_tensors, unit), *side_strides(v_tensors, unit), *(s // unit for s in up.stride()[:2]),
        places.stride(0), 0 if places.shape[1] == 1 else places.stride(1), *mask_strides(mask),
        **config, UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None,
    )  # fmt: skip


def sum_values(weights, tops, values, out, lse, rows_per_split, n_rows, config):
    """Fill the partial results from weights that several KV heads have for the same rows of values."""
    B, G, N, _ = values.rows.shape
    if N == 0:
        return
    tensors = side_tensors(values)
    unit = stride_unit(tensors[0])
    grid = (triton.cdiv(n_rows, config["BM"]) * value_blocks(config), triton.cdiv(N, rows_per_split), B * G)
    weighted_latents_fwd_kernel[grid](
        weights, tops, *tensors, out, lse, N, rows_per_split, n_rows, G, *side_strides(tensors, unit),
        **config, UNIT=unit,
    )  # fmt: skip


def side_tensors(side):
    """Rows, scale and zero with adjacent rows; the rows stand in for what a side does not have."""
    rows, scale, zero = (None if x is None else row_contiguous(x, x.shape[3]) for x in side[:3])
    if scale is not None and scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return tuple(rows if x is None else x for x in (rows, scale, zero))


def side_strides(tensors, unit):
    """Batch and head strides of the rows in units, and of the scale in elements."""
    rows, scale, _ = tensors
    return *(s // unit for s in rows.stride()[:2]), *scale.stride()[:2]


def query_block(n_rows, rotated):
    """Query rows of a KV head per program: keys are rebuilt once for all of them."""
    return min(32 if rotated else 16, max(8, triton.next_power_of_2(n_rows)))


def side_format(side):
    """`(rank, bits, groups)` of one side; 0 bits are rows that are not codes."""
    return format_of(side.rank, side.bits or 0, 0 if side.bits is None else side.scale.shape[3])


def format_of(rank, bits, groups):
    return rank, bits, groups if bits else 0


def side_config(letter, form):
    """Compile-time constants of one side. A row is read as `F` tiles of `W` neighbouring channels.

    Tile `f` of codes is field `f` of every word. Other rows are cut into few powers of two with little padding.
    """
    rank, bits, groups = form
    width = rank * bits // 16 if bits in (8, 4, 2) else min(max(rank & -rank, triton.next_power_of_2(rank) // 4), 128)
    return {
        f"{letter}_RANK": rank, f"{letter}_BITS": bits, f"{letter}_GROUPS": groups,
        f"{letter}W": width, f"{letter}WP": max(16, triton.next_power_of_2(width)),
        f"{letter}F": triton.cdiv(rank, width),
    }  # fmt: skip


def key_config(D, n_rows, keys, values, rotary, mean):
    """Compile-time constants of the first kernel.

    Args:
        D: channels of a query.
        n_rows: query rows of a KV head.
        keys, values: `side_format`; None for values makes it store weights.
        rotary: rotated channels, None without a rebuild of keys.
        mean: whether keys have one.
    """
    half = (rotary or 0) // 2
    rest = 0 if rotary is None else D - rotary
    # chosen by what does not spill (hf_kvcache.kernels.aot): pieces of rotary pairs and of other channels, and whether
    # the table of a tile and, in shared memory, the expansion fit beside the query
    wide, narrow, other = (
        max(16, min(most, triton.next_power_of_2(n))) for most, n in ((64, half), (16, half), (64, rest))
    )
    kept = KEPT // 2 if keys[1] else KEPT
    in_order = n_rows <= 8 and half <= 64 and keys[1] != 3 and keys[0] * D <= kept
    return {
        "D": D, "HALF": half, "HC": wide, "HF": triton.cdiv(half, wide),
        "HC_ANY": narrow, "RP": other, "RF": triton.cdiv(rest, other),
        **side_config("K", keys), **side_config("V", values or keys),
        "BM": query_block(n_rows, half > 0), "NB": LANES, "NR": LANE_ROWS, "REBUILD": rotary is not None,
        "IN_ORDER": in_order, "MEAN": mean, "FUSED": values is not None,
        "num_warps": LANES, "num_stages": 3, "enable_fp_fusion": True,
    }  # fmt: skip


def value_config(n_rows, values):
    """Compile-time constants of the second kernel."""
    rank, bits, _ = values
    config = side_config("V", values)
    if bits in (0, 3):
        # channels are adjacent, so a program takes one tile
        config |= {"VW": rank, "VF": 1}
    # chosen by what does not spill (hf_kvcache.kernels.aot); a warp per 16 channels decodes each code once
    widest = 128 if bits else 256
    width = max(16, min(widest // config["VF"], triton.next_power_of_2(config["VW"])))
    return config | {
        "VWP": width, "BM": min(32, max(8, triton.next_power_of_2(n_rows))), "NR": 32, "TILE": TILE,
        "num_warps": min(4, max(1, width // 16)), "num_stages": 3, "enable_fp_fusion": True,
    }  # fmt: skip


def value_blocks(config):
    """Programs of the second kernel that share the channels of a row."""
    return triton.cdiv(config["VW"], config["VWP"])
