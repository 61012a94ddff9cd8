"""Ops beside attention on float64 operands: the dispatcher takes the reference, which loses nothing."""

import torch

from hf_kvcache.kernels.merge_step import merge_step
from hf_kvcache.kernels.quant_pack import quant_pack, quant_unpack
from hf_kvcache.kernels.slot_step import place_rows
from hf_kvcache.kernels.sparse_pack import sparse_pack, sparse_unpack


def test_merge_step():
    torch.manual_seed(0)
    x, segment = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    weights = torch.rand(2, 3, 5)
    expected = segment.clone()
    expected[:, :, 2] = x
    share = weights.double() / weights.double().sum(-1, keepdim=True)
    expected = (share.unsqueeze(-1) * expected).sum(2)
    mean = merge_step(x, weights, segment, 2)
    assert mean.dtype == torch.float64
    assert torch.allclose(mean, expected, rtol=0, atol=1e-14)


def test_sparse_rows():
    """A difference that float32 does not have decides which channel stays, and values come back bit for bit."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 7, 16, dtype=torch.float64)
    x[0, 0, 0, 3], x[0, 0, 0, 9] = 40.0, 40.0 + 1e-9
    for layout in ("bitmap", "index"):
        values, places = sparse_pack(x, keep=8, layout=layout)
        assert values.dtype == torch.float64
        back = sparse_unpack(values, places, layout=layout, head_dim=16)
        assert torch.equal(back[back != 0], x[back != 0]) and (back != 0).sum() == 8 * 14
        values, places = sparse_pack(x[:, :1, :1], keep=1, layout=layout)
        assert sparse_unpack(values, places, layout=layout, head_dim=16)[0, 0, 0, 9] == x[0, 0, 0, 9]


def test_quantised_rows_are_decoded_exactly():
    """Codes, scale and zero are what they are for float32; what they stand for is not rounded on the way."""
    torch.manual_seed(0)
    # far from zero, where a step is a small part of the number
    x = 300 + torch.randn(1, 2, 32, 16)
    for axis, group_size in (("channel", 32), ("token", 16)):
        packed = quant_pack(x.double(), bits=8, axis=axis, group_size=group_size)
        assert all(torch.equal(a, b) for a, b in zip(packed, quant_pack(x, bits=8, axis=axis, group_size=group_size)))
        back = quant_unpack(*packed, bits=8, axis=axis, dtype=torch.float64)
        scale, zero = (g.double().repeat_interleave(32, 2) if axis == "channel" else g.double() for g in packed[1:])
        code = (back - zero) / scale + 127.5
        # float32 is off by 1e-3 of a step
        assert torch.allclose(code, code.round(), rtol=0, atol=1e-9)
        rounded = quant_unpack(*packed, bits=8, axis=axis).double()
        assert torch.allclose(back, rounded, rtol=1e-7, atol=0) and not torch.equal(back, rounded)


def test_slots():
    torch.manual_seed(0)
    pages = [torch.zeros(4, 1, 16, width, dtype=torch.float64) for width in (8, 6)]
    k, v = (torch.randn(1, 2, 1, width, dtype=torch.float64) for width in (8, 6))
    pending, lengths = torch.full((1, 2, 1), -1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    table = torch.tensor([[[3], [1]]], dtype=torch.int32)
    place_rows(k, v, torch.zeros(1, 2, dtype=torch.bool), None, pending, lengths, 0, *pages, table)
    for x, held in zip((k, v), pages):
        assert torch.equal(held[[3, 1], 0, 0], x[0, :, 0])
