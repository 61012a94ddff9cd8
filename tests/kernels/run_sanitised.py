"""Calls every native op with operands of odd sizes and exact length; `test_native_asan.py` runs it sanitised."""

import torch

import hf_kvcache.kernels.dense_attention  # noqa: F401
from hf_kvcache.kernels import native, use_backend
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention
from hf_kvcache.kernels.merge_step import merge_step
from hf_kvcache.kernels.prompt_attention import prompt_attention
from hf_kvcache.kernels.quant_attention import quant_attention
from hf_kvcache.kernels.quant_pack import quant_pack
from hf_kvcache.kernels.ragged_attention import ragged_attention
from hf_kvcache.kernels.row_weights import row_weights
from hf_kvcache.kernels.slot_step import slot_step
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention
from hf_kvcache.kernels.sparse_pack import sparse_pack
from hf_kvcache.rope import Rope

# the intrinsics of the large source take minutes at -O3 with checks
native.FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in native.FLAGS)


def exact(*shape):
    """A tensor whose memory ends where its last element does, so that one byte further is an error."""
    return torch.randn(*shape)


def dense():
    for n, D, G, S in ((1, 8, 1, 1), (31, 80, 7, 3), (63, 20, 4, 1), (500, 128, 4, 1), (129, 256, 9, 9)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = exact(1, 2 * G, S, D).to(dtype), exact(1, 2, n, D).to(dtype), exact(1, 2, n, D).to(dtype)
            mask = torch.rand(1, 1, S, n) > 0.3
            dense_attention(q, k, v, scaling=0.1)
            dense_attention(q, k, v, scaling=0.1, mask=mask, softcap=5.0)


def prompts():
    for S, N, D, Dv, G in ((1, 1, 8, 8, 1), (31, 31, 80, 47, 7), (7, 260, 33, 16, 4), (300, 513, 64, 128, 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = (exact(2, *shape).to(dtype) for shape in ((2 * G, S, D), (2, N, D), (2, N, Dv)))
            prompt_attention(q, k, v, scaling=0.1)
            prompt_attention(q, k, v, scaling=0.1, is_real=torch.rand(2, N) > 0.3, softcap=5.0)


def quant():
    formats = [((4, 4), 128, 1), ((4, 4), 64, 2), ((8, 8), 80, 1), ((2, 2), 128, 4), ((3, 3), 48, 1), ((8, 2), 256, 2)]
    formats += [((4, 4), 96, 1), ((2, 8), 64, 1), ((4, 4), 16, 1)]
    for bits, D, groups in formats:
        for axis, n, m in (("channel", 32, 1), ("channel", 416, 0), ("token", 31, 5), ("token", 129, 0)):
            for G, S, dtype in ((4, 1, torch.bfloat16), (7, 1, torch.float32), (3, 3, torch.float16)):
                keys = quant_pack(exact(1, 2, n, D), bits=bits[0], axis=axis, group_size=32 if axis == "channel" else D)
                values = quant_pack(exact(1, 2, n, D), bits=bits[1], axis="token", group_size=D // groups)
                q, tail = exact(1, 2 * G, S, D).to(dtype), exact(1, 2, m, D).to(dtype)
                mask = torch.rand(1, 1, S, n + m) > 0.3 if G == 3 else None
                options = {"bits": bits, "key_axis": axis, "scaling": 0.1, "mask": mask}
                quant_attention(q, keys, values, tail, tail.clone(), **options)
                cut = {**options, "n_packed": n // 64 * 32, "mask": None}
                quant_attention(q, keys, values, tail, tail.clone(), **cut)


def pack():
    for D in (16, 48, 80, 128):
        for bits in (8, 4, 3, 2):
            x = exact(1, 2, 64, D)
            quant_pack(x, bits=bits, axis="channel", group_size=32)
            quant_pack(x[:, :, :33].contiguous(), bits=bits, axis="token", group_size=D // 2)
            x[0, 0, 3, 5] = float("nan")
            quant_pack(x.half(), bits=bits, axis="channel", group_size=16)


def sparse():
    for D, keep, n, m in (
        (128, 40, 129, 3),
        (128, 64, 31, 0),
        (80, 16, 33, 1),
        (20, 7, 40, 0),
        (256, 96, 17, 2),
        (8, 1, 70, 0),
    ):
        for G, S, dtype in ((4, 1, torch.bfloat16), (7, 1, torch.float32), (3, 5, torch.float16)):
            q, tail = exact(1, 2 * G, S, D).to(dtype), exact(1, 2, m, D).to(dtype)
            mask = torch.rand(1, 1, S, n + m) > 0.3 if G == 3 else None
            for layout in ("bitmap", "index"):
                packed = sparse_pack(exact(1, 2, n, D).to(dtype), keep=keep, layout=layout)
                sides = [SparseRows(*packed, layout), SparseRows(exact(1, 2, n, D).to(dtype), None)]
                for bits in (8, 4, 3, 2) if keep % 16 == 0 else (8, 4, 2) if keep % 8 == 0 else ():
                    codes, scale, zero = quant_pack(packed[0], bits=bits, axis="token", group_size=keep)
                    sides.append(SparseRows(codes, packed[1], layout, scale, zero, bits))
                for side in sides:
                    sparse_attention(q, side, sides[0], tail, tail.clone(), scaling=0.1, mask=mask)
                    sparse_attention(q, sides[0], side, scaling=0.1)
    # keys and values of different head sizes
    for D, Dv, keep in ((48, 32, 16), (24, 16, 8), (64, 192, 32), (256, 8, 8)):
        for G, S, dtype in ((4, 1, torch.bfloat16), (7, 1, torch.float32), (3, 5, torch.float16)):
            q, tail = exact(1, 2 * G, S, D).to(dtype), (exact(1, 2, 3, D).to(dtype), exact(1, 2, 3, Dv).to(dtype))
            k, v = exact(1, 2, 33, D).to(dtype), exact(1, 2, 33, Dv).to(dtype)
            for layout in ("bitmap", "index"):
                keys = SparseRows(*sparse_pack(k, keep=keep, layout=layout), layout)
                values = SparseRows(*sparse_pack(v, keep=keep, layout=layout), layout, head_dim=Dv)
                for pair in ((keys, values), (keys, SparseRows(v, None)), (SparseRows(k, None), values)):
                    sparse_attention(q, *pair, *tail, scaling=0.1)
    for D, keep, group_size in (
        (128, 64, None),
        (20, 7, None),
        (255, 255, None),
        (80, 40, 4),
        (80, 40, 40),
        (1, 1, None),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            x = exact(1, 2, 65, D).to(dtype)
            sparse_pack(x, keep=keep, layout="index", group_size=group_size)
            sparse_pack(x, keep=keep, layout="bitmap", group_size=group_size, importance=exact(1, 2, 65, D))


def ragged():
    def sides(P, page, D, dtype):
        yield SparseRows(exact(P, 1, page, D).to(dtype), None)
        codes = {bits: quant_pack(exact(P, 1, page, D), bits=bits, axis="token", group_size=D) for bits in (8, 4, 2)}
        for bits, (values, scale, zero) in codes.items():
            yield SparseRows(values, None, "bitmap", scale, zero, bits)
        for layout in ("bitmap", "index"):
            values, places = sparse_pack(exact(P, 1, page, D).to(dtype), keep=D // 2, layout=layout)
            yield SparseRows(values, places, layout)
            codes, scale, zero = quant_pack(values, bits=8, axis="token", group_size=D // 2)
            yield SparseRows(codes, places, layout, scale, zero, 8)

    for page, D, lengths in ((16, 64, (0, 1, 15, 17)), (32, 128, (31, 33, 300, 0)), (64, 40, (130, 64, 63, 65))):
        lengths = torch.tensor([lengths], dtype=torch.int32)
        counts = (lengths + page - 1) // page
        P = int(counts.sum())
        # entries behind the end of a head lead out of the pool
        table = torch.full((1, 4, int(counts.max())), 2**30, dtype=torch.int32)
        table[torch.arange(table.shape[2]) < counts.unsqueeze(-1)] = torch.randperm(P).int()
        for G, S, dtype in ((4, 1, torch.bfloat16), (7, 1, torch.float32), (3, 5, torch.float16)):
            q, formats = exact(1, 4 * G, S, D).to(dtype), list(sides(P, page, D, dtype))
            for keys, values in zip(formats, (*formats[1:], formats[0]), strict=True):
                ragged_attention(q, keys, values, table, lengths, scaling=0.1)
                tail, mask = exact(1, 4, page + 1, D).to(dtype), torch.rand(1, 4, S, page + 1) > 0.3
                ragged_attention(q, keys, keys, table, lengths, tail, tail.clone(), scaling=0.1, mask=mask, softcap=5.0)


def lowrank():
    def sides(G, n, rank, dtype):
        yield Latents(exact(1, G, n, rank).to(dtype))
        for bits, groups in ((8, 1), (4, 1), (4, 2), (3, 1), (2, 1)):
            if rank % 16 == 0:
                codes = quant_pack(exact(1, G, n, rank), bits=bits, axis="token", group_size=rank // groups)
                yield Latents(*codes, bits)

    shapes = ((64, 128, 64, 130), (33, 20, 10, 31), (48, 80, 24, 1), (1, 2, 2, 33), (16, 40, 0, 65), (160, 96, 96, 129))
    for rank, D, rotated, n in shapes:
        for dtype, G, S in ((torch.bfloat16, 4, 1), (torch.float32, 3, 5), (torch.float16, 1, 33)):
            mask = torch.rand(1, 1, S, n) > 0.3 if S == 5 else None
            how = KeyExpansion(exact(2, rank, D).to(dtype), exact(2, D))
            if rotated:
                rope = Rope(10000.0 ** (-torch.arange(0, rotated, 2) / rotated))
                rope.cover(300, torch.device("cpu"))
                places = torch.randint(0, 300, (1, 1 + (G == 3), n), dtype=torch.int32)
                how = how._replace(positions=places, tables=rope.tables(torch.device("cpu")))
            for keys in sides(2, n, rank, dtype):
                for values in (keys, Latents(exact(1, 1, n, rank + 3).to(dtype))):
                    lowrank_attention(exact(1, 2 * G, S, D).to(dtype), keys, values, how, scaling=0.1, mask=mask)
                    lowrank_attention(exact(1, 2 * G, S, rank).to(dtype), keys, values, scaling=0.1, mask=mask)


def steps():
    for w, D in ((1, 8), (12, 128), (5, 47), (64, 255), (3, 9), (17, 80)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, weights, segment = exact(2, 3, D).to(dtype), torch.rand(2, 3, w), exact(2, 3, w, D)
            weights[..., w // 2 :] *= torch.rand(2, 3, w - w // 2) < 0.5
            for held in (segment.to(dtype), segment):
                weights[..., w - 1] = 1.0
                merge_step(x, weights, held, w - 1)
    for delay in (0, 1, 5, 256):
        pending, lengths = torch.full((2, 3, delay + 1), -1, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
        for t in range(300):
            is_real = torch.rand(2) < 0.9 if t % 2 else None
            slot_step(torch.rand(2, 3) < 0.5, is_real, pending, lengths, t)


def weights():
    for n, D, G, S in ((1, 8, 1, 1), (31, 80, 7, 3), (64, 20, 4, 1), (500, 128, 2, 33), (129, 256, 3, 9)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k = exact(2, 2 * G, S, D).to(dtype), exact(2, 2, n, D).to(dtype)
            positions, is_real = torch.randint(-1, n + S, (2, 2, n)), torch.rand(2, 2, S) < 0.8
            row_weights(q, k, positions, n, scaling=0.1)
            row_weights(q, k, positions, n, scaling=0.1, softcap=5.0, q_is_real=is_real, reduce="max")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    with use_backend("native"):
        dense()
        prompts()
        pack()
        quant()
        sparse()
        ragged()
        lowrank()
        steps()
        weights()
    print("clean")
