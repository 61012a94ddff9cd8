"""Calls of every op on some operands: by the library, and by a kernel repository in a process without it.

A case takes a module with the names that a repository offers and returns tensors. Heads share keys (GQA), lengths are
odd, batches are larger than one.
"""

import torch

B, H, G, S, D, N, TAIL = 2, 2, 3, 2, 64, 96, 17
KNOBS = {"scaling": 0.125, "softcap": 20.0}


def rows(n, dtype, n_sides=2):
    torch.manual_seed(n)
    return torch.randn(n_sides, B, H, n, D).to(dtype)


def queries(dtype):
    torch.manual_seed(0)
    return torch.randn(B, H * G, S, D).to(dtype)


def visible(n):
    """Queries see no later rows; the first batch row is padded on the left."""
    mask = (torch.arange(n) <= torch.arange(n - S, n).unsqueeze(-1)).repeat(B, 1, 1, 1)
    mask[0, ..., :5] = False
    return mask


def dense_attention(kernel):
    for dtype in (torch.float32, torch.float16):
        q, (k, v) = queries(dtype), rows(63, dtype)
        parts = [kernel.dense_attention(q, k[:, :, a:b], v[:, :, a:b], **KNOBS) for a, b in ((0, 40), (40, 63))]
        yield from kernel.merge_states(parts)
        yield from kernel.dense_attention(q, k, v, mask=visible(63), **KNOBS)


def quant_attention(kernel):
    dtype = torch.float16
    q, (k, v), tails = queries(dtype), rows(N, dtype), rows(TAIL, dtype)
    for bits in (8, 4, 2):
        keys = kernel.quant_pack(k, bits=bits, axis="channel", group_size=32)
        values = kernel.quant_pack(v, bits=bits, axis="token", group_size=64)
        form = {"bits": (bits, bits), "key_axis": "channel"}
        yield from kernel.quant_attention(q, keys, values, *tails, mask=visible(N + TAIL), **form, **KNOBS)


def quant_pack(kernel):
    for dtype in (torch.float32, torch.float16):
        (x,) = rows(N, dtype, 1)
        for bits, axis in ((4, "channel"), (2, "token"), (8, "token")):
            packed = kernel.quant_pack(x, bits=bits, axis=axis, group_size=32 if axis == "channel" else 64)
            yield from packed
            yield kernel.quant_unpack(*packed, bits=bits, axis=axis)


def sides(kernel, x, bits=None, group_size=None):
    values, places = kernel.sparse_pack(x, keep=D // 2, layout="bitmap", group_size=group_size)
    if bits is None:
        return kernel.SparseRows(values, places, group_size=group_size)
    codes, scale, zero = kernel.quant_pack(values, bits=bits, axis="token", group_size=D // 2)
    return kernel.SparseRows(codes, places, "bitmap", scale, zero, bits)


def sparse_attention(kernel):
    dtype = torch.float16
    q, (k, v), tails = queries(dtype), rows(51, dtype), rows(TAIL, dtype)
    for form in ({}, {"group_size": 4}, {"bits": 4}):
        packed = [sides(kernel, x, **form) for x in (k, v)]
        yield from kernel.sparse_attention(q, *packed, *tails, mask=visible(51 + TAIL), **KNOBS)
        assert packed[0].keep == D // 2


def sparse_pack(kernel):
    for dtype in (torch.float32, torch.float16):
        x, importance = rows(51, dtype)
        for layout in kernel.LAYOUTS:
            packed = kernel.sparse_pack(x, keep=24, layout=layout, importance=importance)
            yield from packed
            yield kernel.sparse_unpack(*packed, layout=layout, head_dim=D)


def ragged_attention(kernel):
    dtype, page, n_pages = torch.float16, 16, 12
    torch.manual_seed(1)
    pages = torch.randn(2, n_pages, 1, page, D).to(dtype)
    lengths = torch.tensor([[37, 0], [16, 63]], dtype=torch.int32)
    table = torch.randperm(n_pages)[:8].view(2, 2, 2).int().repeat(1, 1, 2)
    q = queries(dtype)
    yield from kernel.ragged_attention(q, *(kernel.SparseRows(x, None) for x in pages), table, lengths, **KNOBS)
    for form in ({}, {"bits": 4}):
        packed = [sides(kernel, x, **form) for x in pages]
        yield from kernel.ragged_attention(q, *packed, table, lengths, **KNOBS)
    tail = torch.randn(2, 2, 2, 5, D).to(dtype)
    yield from kernel.ragged_attention(q, *packed, table, lengths, *tail, **KNOBS)


def lowrank_attention(kernel):
    dtype, rank = torch.float16, 32
    torch.manual_seed(2)
    q, (keys, values) = queries(dtype), torch.randn(2, B, 1, 63, rank).to(dtype)
    rope = kernel.Rope(10000.0 ** -(torch.arange(0, D, 2).double() / D))
    rope.cover(200, q.device)
    positions = (torch.arange(63) - torch.tensor([0, 5]).view(B, 1, 1)).clamp(min=0).int() * 3
    up = torch.randn(H, rank, D).to(dtype) / rank**0.5
    rotated = kernel.KeyExpansion(up, torch.randn(H, D), positions, rope.tables(q.device))
    assert isinstance(rotated.tables, kernel.RotaryTables)
    coded = kernel.Latents(*kernel.quant_pack(values, bits=4, axis="token", group_size=rank), 4)
    for side in (kernel.Latents(values), coded):
        yield from kernel.lowrank_attention(q, kernel.Latents(keys), side, rotated, mask=visible(63), **KNOBS)


def merge_states(kernel):
    torch.manual_seed(5)
    states = [(torch.randn(B, H * G, S, D), torch.randn(B, H * G, S)) for _ in range(3)]
    states[1][1][0] = float("-inf")
    yield from kernel.merge_states(states)
    yield from kernel.with_sink(*states[0], torch.linspace(-1, 1, states[0][0].shape[1]))


def merge_step(kernel):
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(3)
        x, segment, weights = torch.randn(B, H, D).to(dtype), torch.randn(B, H, 12, D).to(dtype), torch.rand(B, H, 12)
        yield kernel.merge_step(x, weights, segment, 5)
        yield segment


def row_weights(kernel):
    torch.manual_seed(6)
    positions = torch.randperm(120)[:51].expand(B, H, 51).clone()
    positions[0, :, :5] = -1
    is_real = torch.tensor([[[False, True]], [[True, True]]])
    for dtype in (torch.float32, torch.float16):
        q, (k,) = queries(dtype), rows(51, dtype, 1)
        for reduce in kernel.REDUCTIONS:
            yield kernel.row_weights(q, k, positions, 90, q_is_real=is_real, reduce=reduce, **KNOBS)


def slot_step(kernel):
    torch.manual_seed(4)
    delay, page = 2, 16
    pending, lengths = torch.full((B, H, delay + 1), -1, dtype=torch.int32), torch.zeros(B, H, dtype=torch.int32)
    table = torch.arange(2 * B * H, dtype=torch.int32).view(B, H, 2)
    k_pages, v_pages = torch.zeros(2, 2 * B * H, 1, page, D).half()
    for t in range(20):
        alpha, is_real = torch.rand(B, H) < 0.5, torch.tensor([t >= 3, True])
        if t % 2:
            yield kernel.slot_step(alpha, is_real, pending, lengths, t)
        else:
            k, v = torch.randn(2, B, H, 1, D).half()
            kernel.place_rows(k, v, alpha, is_real, pending, lengths, t, k_pages, v_pages, table)
    yield from (pending, lengths, k_pages, v_pages)


CASES = {
    case.__name__: case
    for case in (
        dense_attention,
        lowrank_attention,
        merge_states,
        merge_step,
        quant_attention,
        quant_pack,
        ragged_attention,
        row_weights,
        slot_step,
        sparse_attention,
        sparse_pack,
    )
}

Q, K = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 8, 64)
# operands that do not fit together
WRONG = {
    "dense_attention": lambda kernel: kernel.dense_attention(Q, K, K[..., :7, :], scaling=1.0),
    "lowrank_attention": lambda kernel: kernel.lowrank_attention(
        Q, kernel.Latents(K), kernel.Latents(K[:, :, 1:]), scaling=1.0
    ),
    "merge_step": lambda kernel: kernel.merge_step(K[:, :, 0], K[..., :3, 0], K, 0),
    "quant_attention": lambda kernel: kernel.quant_attention(
        Q, (K, K, K), (K, K, K), bits=(4, 4), key_axis="token", scaling=1.0
    ),
    "quant_pack": lambda kernel: kernel.quant_pack(K, bits=5, axis="token", group_size=64),
    "ragged_attention": lambda kernel: kernel.ragged_attention(
        Q, kernel.SparseRows(K, None), kernel.SparseRows(K, None), K, K, scaling=1.0
    ),
    "row_weights": lambda kernel: kernel.row_weights(Q, K, K[..., 0].int(), 7, scaling=1.0, reduce="mean"),
    "slot_step": lambda kernel: kernel.slot_step(Q, None, K, K, 0),
    "sparse_attention": lambda kernel: kernel.sparse_attention(
        Q, kernel.SparseRows(K[..., :32], None), kernel.SparseRows(K, None), scaling=1.0
    ),
    "sparse_pack": lambda kernel: kernel.sparse_pack(K, keep=65, layout="bitmap"),
}
