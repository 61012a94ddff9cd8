"""A call of every attention op in every kind of format, beside the same keys and values dense in float64."""

import torch

from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention
from hf_kvcache.kernels.quant_attention import quant_attention
from hf_kvcache.kernels.quant_pack import reference as quant
from hf_kvcache.kernels.ragged_attention import ragged_attention
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention
from hf_kvcache.kernels.sparse_pack import reference as sparse
from hf_kvcache.rope import FINE, RotaryTables, rotate

B, HKV, N, TAIL, PAGE = 2, 2, 96, 31, 16
LENGTHS = [[0, 63], [17, 90]]


def rows(n, width, dtype, batch=B, heads=HKV):
    return torch.randn(batch, heads, n, width).to(dtype)


def dense(D, Dv, dtype):
    k, v = rows(N + TAIL, D, dtype), rows(N + TAIL, Dv, dtype)
    return lambda q, **options: dense_attention(q, k, v, **options), k.double(), v.double()


def codes(x, bits, axis, group_size):
    """Packed rows, and what they stand for in float64."""
    packed = quant.quant_pack(x, bits=bits, axis=axis, group_size=group_size)
    return packed, quant.quant_unpack(*packed, bits=bits, axis=axis, dtype=torch.float64)


def quantised(axis, bits):
    def make(D, Dv, dtype):
        keys, k = codes(rows(N, D, dtype), bits[0], axis, 32 if axis == "channel" else D)
        values, v = codes(rows(N, Dv, dtype), bits[1], "token", Dv)
        tail = rows(TAIL, D, dtype), rows(TAIL, Dv, dtype)
        form = {"bits": bits, "key_axis": axis}
        whole = (torch.cat([x, end.double()], 2) for x, end in zip((k, v), tail))
        return lambda q, **options: quant_attention(q, keys, values, *tail, **form, **options), *whole

    return make


def sparse_side(x, keep, layout, bits=None):
    """`SparseRows` of `x` with half of the channels (`keep`), and what they stand for in float64."""
    D = x.shape[-1]
    values, places = sparse.sparse_pack(x, keep=D // 2, layout=layout) if keep else (x, None)
    held, scale, zero = values.double(), None, None
    if bits is not None:
        (values, scale, zero), held = codes(values, bits, "token", values.shape[-1])
    if keep:
        held = sparse.sparse_unpack(held, places, layout=layout, head_dim=D)
    return SparseRows(values, places, layout, scale, zero, bits, head_dim=D if keep else None), held


def sparse_rows(k_form, v_form):
    def make(D, Dv, dtype):
        (keys, k), (values, v) = sparse_side(rows(N, D, dtype), *k_form), sparse_side(rows(N, Dv, dtype), *v_form)
        tail = rows(TAIL, D, dtype), rows(TAIL, Dv, dtype)
        whole = (torch.cat([x, end.double()], 2) for x, end in zip((k, v), tail))
        return lambda q, **options: sparse_attention(q, keys, values, *tail, **options), *whole

    return make


def ragged_rows(k_form, v_form):
    """Keys and values come back `[B, Hkv, n, D]` with NaN behind the end of a head."""

    def make(D, Dv, dtype):
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        per_head = -(-int(lengths.max()) // PAGE)
        table = torch.randperm(lengths.numel() * per_head, dtype=torch.int32).view(*lengths.shape, per_head)
        is_row = torch.arange(per_head * PAGE) < lengths.unsqueeze(-1)
        sides, whole = [], []
        for width, form in ((D, k_form), (Dv, v_form)):
            side, held = sparse_side(rows(PAGE, width, dtype, table.numel(), 1), *form)
            held = held[table.flatten().long()].reshape(*lengths.shape, -1, width)
            sides.append(side)
            whole.append(held.masked_fill(~is_row.unsqueeze(-1), torch.nan))
        return lambda q, **options: ragged_attention(q, *sides, table, lengths, **options), *whole

    return make


def tables(rotary):
    """Tables for 4,096 positions."""
    inv_freq = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = (torch.outer(torch.arange(n) * step, inv_freq) for n, step in ((64, FINE), (FINE, 1)))
    return RotaryTables(*(torch.stack([x.cos(), x.sin()]).float() for x in angles))


def lowrank(rank, is_rotated):
    """Latents of keys that are rebuilt; values are rows of full rank, `Dv` channels."""

    def make(D, Dv, dtype):
        keys, values = rows(N + TAIL, rank, dtype), rows(N + TAIL, Dv, dtype)
        up, mean = (torch.randn(HKV, rank, D) / rank**0.5).to(dtype), torch.randn(HKV, D)
        k = keys.double() @ up.double() + mean.double().unsqueeze(1)
        expansion = KeyExpansion(up, mean)
        if is_rotated:
            positions = torch.arange(N + TAIL, dtype=torch.int32).expand(B, 1, -1).contiguous() + 70
            expansion = KeyExpansion(up, mean, positions, tables(D))
            cos, sin = (x.double() for x in expansion.tables.cos_sin(positions))
            k = rotate(k, cos, sin)
        run = lambda q, **options: lowrank_attention(q, Latents(keys), Latents(values), expansion, **options)  # noqa: E731
        return run, k, values.double()

    return make


ALL, HALF, BITMAP8, NUMBERS = (False, None), (True, "bitmap"), (True, "bitmap", 8), (True, "index")
FORMATS = {
    "dense": dense,
    "quant4-channel": quantised("channel", (4, 4)),
    "quant8k4v-token": quantised("token", (8, 4)),
    "sparse-bitmap": sparse_rows(HALF, HALF),
    "sparse-bitmap-8bit": sparse_rows(BITMAP8, BITMAP8),
    "sparse-index": sparse_rows(NUMBERS, NUMBERS),
    "sparse-k-only": sparse_rows(HALF, (False, None)),
    "sparse-v-only-4bit-k": sparse_rows((False, None, 4), HALF),
    "ragged-dense": ragged_rows(ALL, ALL),
    "ragged-4bit": ragged_rows((False, None, 4), (False, None, 4)),
    "ragged-8bit-k-bitmap-v": ragged_rows((False, None, 8), HALF),
    "ragged-index": ragged_rows(NUMBERS, NUMBERS),
    "lowrank": lowrank(16, False),
    "lowrank-rope": lowrank(16, True),
}
