"""Triton kernels of low-rank latents against the reference; where they run is said in `test_triton.py`."""

import pytest
import torch
from rooms import telling
from test_triton import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LOW,
    LSE,
    ON_GPU,
    assert_close,
    in_larger_buffer,
    run_in_the_interpreter,
    runs_kernels,
    visible,
)

from hf_kvcache.kernels import BackendUnavailable, choose, use_backend
from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention
from hf_kvcache.kernels.lowrank_attention import reference as attention
from hf_kvcache.kernels.quant_pack.reference import quant_pack
from hf_kvcache.rope import FINE, RotaryTables, rotate

# RMS error relative to that of the result where eager arithmetic happens to be exact
FLOOR = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


def tables(rotary, limit=1 << 17):
    """Tables of `rotary` channels with the frequencies of Llama 3."""
    inv_freq = 500000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)

    def angles(n, step):
        angle = torch.outer(torch.arange(n, dtype=torch.float64) * step, inv_freq)
        return torch.stack([angle.cos(), angle.sin()]).float().to(DEVICE)

    return RotaryTables(angles(limit // FINE, FINE), angles(FINE, 1))


def positions(kind, B, Hkv, N):
    """int32 `[B, 1 | Hkv, N]`: in order, far away, after left padding, or of what an eviction left."""
    if kind is None:
        return None
    rows = torch.arange(N, device=DEVICE).expand(B, 1, N).clone()
    if kind == "far":
        rows += 100_003
    elif kind == "padded":
        # a token was evicted from the first row of the batch: its ends alone would pass for consecutive positions
        rows = (rows - 6 * torch.arange(B, device=DEVICE).view(B, 1, 1) - 1).clamp(min=0)
        rows[0, 0, 2:] += 1
    elif kind == "evicted":
        gaps = torch.randint(0, 5, (B, Hkv, N), device=DEVICE)
        gaps[:, :, 130:] = 0
        rows = rows + gaps.cumsum(2)
    elif kind == "shuffled":
        rows = torch.randint(0, 120_000, (B, Hkv, N), device=DEVICE)
    return in_larger_buffer(rows.int().unsqueeze(-1), 5).squeeze(-1)


def latents(B, G, N, rank, dtype, bits=None, groups=1):
    """Latents of falling size, as views of larger buffers."""
    x = torch.randn(B, G, N, rank, device=DEVICE) * torch.linspace(2, 0.1, rank, device=DEVICE)
    if bits is None:
        return Latents(in_larger_buffer(x.to(dtype), 13))
    codes, scale, zero = quant_pack(x, bits=bits, axis="token", group_size=rank // groups)
    return Latents(*(in_larger_buffer(part, 13) for part in (codes, scale, zero)), bits)


def case_of(
    B=1, Hkv=2, G=4, S=1, D=64, N=63, k=(2, 32), v=(2, 32), place="far", rotary=None, mean=True,
    mask=None, softcap=None, rebuild=True,
):  # fmt: skip
    """Sizes of a call; `k` and `v` are groups, rank, and for codes bits and scales per row."""
    return B, Hkv, G, S, D, N, k, v, place, rotary, mean, mask, softcap, rebuild


CASES = {
    "one-row": case_of(N=1),
    "llama-3-500": case_of(D=128, N=500, k=(2, 64), v=(1, 128)),
    "llama-2-per-head": case_of(G=1, D=128, N=130, k=(2, 64), v=(2, 64)),
    "gqa7-s5-mask": case_of(B=2, Hkv=1, G=7, S=5, D=80, k=(1, 48), v=(1, 48), mask="each", mean=False),
    "gqa2-s3-mask": case_of(B=2, G=2, S=3, N=70, mask="each", softcap=20.0),
    "gqa8-joint-512": case_of(Hkv=2, G=8, N=70, k=(2, 16), v=(1, 512)),
    "joint-1040": case_of(S=3, G=1, N=70, k=(2, 16), v=(1, 1040)),
    "padded-batch": case_of(B=2, N=150, place="padded", mask="batch"),
    "padded-batch-joint": case_of(B=2, N=150, v=(1, 48), place="padded", mask="each"),
    "evicted-then-in-order": case_of(B=2, N=600, place="evicted", v=(1, 64)),
    "shuffled-partial-rotary": case_of(D=80, place="shuffled", rotary=32),
    "partial-rotary-96": case_of(D=96, N=130, k=(1, 64), rotary=48, mean=False, softcap=20.0),
    "no-rotary": case_of(D=64, place=None, k=(2, 64), v=(1, 48)),
    "256-shared-keys": case_of(D=256, k=(1, 128), v=(2, 64), G=2),
    "256-wide-keys": case_of(D=256, N=70, k=(1, 240), v=(1, 320), G=1),
    "8bit-joint-4bit": case_of(N=130, k=(2, 64, 8, 1), v=(1, 128, 4, 2)),
    "4bit-per-head-s5": case_of(B=2, S=5, D=128, N=70, k=(2, 64, 4, 1), v=(2, 64, 4, 1), mask="all"),
    "3bit-2bit": case_of(N=70, k=(2, 48, 3, 1), v=(1, 256, 2, 4)),
    "2bit-3bit": case_of(N=70, k=(2, 128, 2, 2), v=(1, 96, 3, 3)),
    "groups-across-fields": case_of(N=70, k=(2, 48, 4, 2), v=(2, 48, 8, 3)),
    "4bit-wide-keys": case_of(D=128, N=70, k=(1, 256, 4, 1), v=(2, 80)),
    "absorbed": case_of(B=2, S=2, N=130, k=(2, 48), v=(1, 48), rebuild=False, mask="head", softcap=20.0),
    "absorbed-per-head-s5": case_of(S=5, D=128, N=500, k=(2, 64), v=(2, 128), rebuild=False),
    "absorbed-4bit": case_of(N=70, k=(2, 64, 4, 1), v=(2, 64, 4, 1), rebuild=False),
    "absorbed-80": case_of(N=70, k=(2, 80), v=(2, 112), rebuild=False),
    "absorbed-joint": case_of(Hkv=1, G=4, N=70, k=(1, 256), v=(1, 256), rebuild=False),
    "many-queries": case_of(G=4, S=32, N=70, k=(2, 16), v=(1, 32), mask="all"),
    "no-rows": case_of(N=0),
    "no-rows-joint": case_of(N=0, v=(1, 32)),
}  # fmt: skip


def lowrank_case(case, dtype):
    B, Hkv, G, S, D, N, k, v, place, rotary, mean, mask, softcap, rebuild = case
    torch.manual_seed(N + D)
    keys, values = latents(B, k[0], N, k[1], dtype, *k[2:]), latents(B, v[0], N, v[1], dtype, *v[2:])
    width = D if rebuild else k[1]
    q = torch.randn(B, S, Hkv * G, width, device=DEVICE).to(dtype).transpose(1, 2)
    expansion = None
    if rebuild:
        # heads of a group are neighbours in its expansion, so rows of a head are not adjacent
        up = (torch.randn(k[1], Hkv, D, device=DEVICE) / k[1] ** 0.5).to(dtype).transpose(0, 1)
        mean = torch.randn(Hkv, D, device=DEVICE) if mean else None
        place = positions(place, B, Hkv, N)
        expansion = KeyExpansion(up, mean, place, None if place is None else tables(rotary or D))
    arguments = {"scaling": width**-0.5, "mask": visible(B, Hkv, S, N, mask), "softcap": softcap}
    return (q, keys, values, expansion), arguments


def in_float64(q, keys, values, expansion):
    """The same numbers, so that the reference is exact."""
    keys, values = (side if side.bits else Latents(side.rows.double()) for side in (keys, values))
    if expansion is not None:
        expansion = expansion._replace(up=expansion.up.double())
    return q.double(), keys, values, expansion


def eager(q, keys, values, expansion, *, scaling, mask, softcap):
    """The same attention, every step rounded to the dtype of the query."""
    dtype, N = q.dtype, keys.rows.shape[2]
    Hkv = max(keys.rows.shape[1], values.rows.shape[1]) if expansion is None else expansion.up.shape[0]
    k, v = (attention._per_head(attention._unpacked(side, slice(None), dtype), Hkv) for side in (keys, values))
    if expansion is not None:
        k = k @ expansion.up
        if expansion.mean is not None:
            k = k + expansion.mean.to(dtype).unsqueeze(1)
        if expansion.positions is not None:
            k = rotate(k, *(x.to(dtype) for x in expansion.tables.cos_sin(expansion.positions)))
    B, Hq, S, width = q.shape
    scores = q.reshape(B, Hkv, -1, width) @ k.transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        seen = mask.expand(B, Hkv, S, N).repeat(1, 1, Hq // Hkv, 1)
        scores = scores.masked_fill(~seen, float("-inf"))
    out = scores.float().softmax(-1).nan_to_num(0.0).to(dtype) @ v
    return out.view(B, Hq, S, -1)


@runs_kernels
@pytest.mark.parametrize("dtype", telling(LOW, "fp16"))
@pytest.mark.parametrize(
    "case", telling(CASES, "gqa2-s3-mask", "shuffled-partial-rotary", "8bit-joint-4bit", "absorbed")
)
def test_lowrank_attention(case, dtype):
    operands, arguments = lowrank_case(CASES[case], DTYPES[dtype])
    with use_backend("triton"):
        out, lse = lowrank_attention(*operands, **arguments)
    expected_out, expected_lse = attention.lowrank_attention(*in_float64(*operands), **arguments)
    (q, _, values, _), dtype = operands, DTYPES[dtype]
    assert out.shape == (*q.shape[:3], values.rank) and out.dtype == lse.dtype == torch.float32
    by_eager = eager(*operands, **arguments).double() - expected_out
    by_eager = float(by_eager.square().mean().sqrt() / expected_out.square().mean().sqrt()) if out.any() else 0.0
    assert_close("out", expected_out, out, max(by_eager, FLOOR[dtype]))
    assert_close("lse", expected_lse, lse, LSE[dtype])


@runs_kernels
def test_what_the_kernels_cannot_do_is_said():
    (q, keys, values, expansion), _ = lowrank_case(case_of(N=8, k=(2, 24)), DTYPES[LOW[1]])
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="rank 24"):
        lowrank_attention(q, keys, values, expansion, scaling=1.0)
    operands, _ = lowrank_case(case_of(N=8, k=(1, 512)), DTYPES[LOW[1]])
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="above 256"):
        lowrank_attention(*operands, scaling=1.0)
    if ON_GPU:
        operands, _ = lowrank_case(case_of(), torch.float32)
        assert "float32" in choose("lowrank_attention", DEVICE, operands).reason
