"""Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when Triton is first imported, so without a GPU these tests run in a process of their own,
started by `test_in_the_interpreter`, or by `test_interpreter.py` for those not slow. Its bfloat16 arithmetic is
wrong: float32 and float16 there, all three on a GPU.
"""

import os
import re
import sys

import pytest
import torch
from rooms import telling

from hf_kvcache.kernels import compilers

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LOW = ["fp16", "bf16"] if ON_GPU else ["fp32", "fp16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# RMS error relative to the RMS of the result
OUT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
LSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}

runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs inside test_in_the_interpreter")


def run_in_the_interpreter(*files, config):
    """Run the tests of `files` that `config` selects in a process in which Triton interprets its kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", config.option.markexpr]
    done = compilers.run([sys.executable, "-m", "pytest", *options, *map(str, files)], env=env)
    print(done.stdout[-3000:])
    if done.returncode and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton does not work with this numpy")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes any device")
def test_cpu_tensors_are_refused_with_a_reason():
    from hf_kvcache.kernels.quant_attention import triton_kernel

    assert "CUDA" in triton_kernel.unavailable(torch.device("cpu"))


def assert_close(name, expected, got, ratio):
    """RMS of the difference within `ratio` of the RMS of what is expected; infinities must coincide."""
    expected, got = expected.double().cpu(), got.double().cpu()
    assert torch.equal(expected.isinf(), got.isinf()), f"{name}: infinities differ"
    finite = ~expected.isinf()
    assert not got[finite].isnan().any(), f"{name}: NaN"
    error = (expected[finite] - got[finite]).square().mean().sqrt()
    scale = expected[finite].square().mean().sqrt().clamp(min=1e-3)
    assert not finite.any() or error <= ratio * scale, f"{name}: {error / scale:.2e} > {ratio:.0e}"


def visible(B, Hkv, S, N, kind):
    """A random mask of the named broadcast shape; the last query of the first row sees nothing."""
    if kind is None:
        return None
    shape = {"all": (1, 1), "batch": (B, 1), "head": (1, Hkv), "each": (B, Hkv)}[kind]
    mask = torch.rand(*shape, S, N, device=DEVICE) > 0.4
    mask[:, :, :, :1] = True
    mask[0, :, -1] = False
    return mask


def in_larger_buffer(x, spare):
    """A view of the same rows inside a buffer with `spare` more rows, as a growing store hands out."""
    buffer = torch.full((*x.shape[:2], x.shape[2] + spare, x.shape[3]), 77, dtype=x.dtype, device=x.device)
    buffer[:, :, : x.shape[2]] = x
    return buffer[:, :, : x.shape[2]]


def random_case(B, Hkv, G, S, D, N, dtype, bias=0.0):
    torch.manual_seed(B + 10 * Hkv + 100 * G + S + D + N)
    q = torch.randn(B, S, Hkv * G, D, device=DEVICE).to(dtype).transpose(1, 2)
    k = (torch.randn(B, Hkv, N, D, device=DEVICE) + bias * torch.randn(1, Hkv, 1, D, device=DEVICE)).to(dtype)
    return q, k, torch.randn(B, Hkv, N, D, device=DEVICE).to(dtype)


# name: batch, kv heads, query heads per kv head, queries, head size, rows, mask, softcap
DENSE = {
    "one-row": (1, 1, 1, 1, 16, 1, None, None),
    "gqa4-500": (1, 2, 4, 1, 64, 500, None, None),
    "gqa7-s3-mask": (2, 1, 7, 3, 80, 63, "each", None),
    "mask-softcap": (1, 2, 4, 1, 128, 31, "all", 20.0),
    "wide": (1, 1, 4, 1, 256, 130, "batch", None),
    "odd-head-size": (1, 1, 2, 2, 24, 40, "head", None),
    "chunk-of-70": (1, 1, 2, 70, 64, 200, "all", None),
    "no-rows": (1, 1, 4, 1, 64, 0, None, None),
}


@runs_kernels
@pytest.mark.parametrize("dtype", telling(LOW, "fp16"))
@pytest.mark.parametrize("case", telling(DENSE, "gqa7-s3-mask", "mask-softcap"))
def test_dense_attention(case, dtype):
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.dense_attention import dense_attention, reference

    B, Hkv, G, S, D, N, kind, softcap = DENSE[case]
    dtype = DTYPES[dtype]
    q, k, v = random_case(B, Hkv, G, S, D, N, dtype)
    k, v = in_larger_buffer(k, 13), in_larger_buffer(v, 13)
    arguments = {"scaling": D**-0.5, "mask": visible(B, Hkv, S, N, kind), "softcap": softcap}
    with use_backend("triton"):
        out, lse = dense_attention(q, k, v, **arguments)
    expected_out, expected_lse = reference.dense_attention(q.double(), k.double(), v.double(), **arguments)
    assert out.shape == q.shape and out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", expected_out, out, OUT[dtype])
    assert_close("lse", expected_lse, lse, LSE[dtype])


# name: batch, kv heads, query heads per kv head, queries, head size, packed rows, tail rows,
#       bits, key axis, channels of a key and of a value group, mask, softcap
QUANT = {
    "4bit-gqa4": (1, 1, 4, 1, 128, 512, 31, (4, 4), "channel", 0, 64, None, None),
    "2bit-batch-no-tail": (2, 2, 4, 1, 128, 160, 0, (2, 2), "channel", 0, 32, None, None),
    "8bit-gqa7-s3-mask": (1, 1, 7, 3, 64, 96, 63, (8, 8), "channel", 0, 32, "each", None),
    "k8v4-softcap": (1, 2, 1, 1, 128, 64, 1, (8, 4), "channel", 0, 64, "all", 30.0),
    "k4v2-80": (2, 1, 1, 1, 80, 64, 5, (4, 2), "channel", 0, 80, "batch", None),
    "4bit-96": (1, 2, 2, 1, 96, 32, 5, (4, 4), "channel", 0, 96, "head", None),
    "2bit-16": (1, 1, 4, 2, 16, 96, 5, (2, 2), "channel", 0, 16, None, None),
    "8bit-256": (1, 1, 2, 1, 256, 160, 3, (8, 8), "channel", 0, 128, None, None),
    "4bit-256": (1, 1, 2, 1, 256, 128, 3, (4, 4), "channel", 0, 64, None, None),
    "4bit-token-500": (1, 1, 4, 1, 64, 500, 31, (4, 4), "token", 64, 32, "all", None),
    "8bit-token-63": (1, 1, 4, 3, 64, 63, 1, (8, 8), "token", 32, 64, None, None),
    "2bit-token-31": (1, 1, 1, 1, 128, 31, 0, (2, 2), "token", 32, 32, None, None),
    "4bit-chunk-of-40": (1, 1, 2, 40, 64, 64, 40, (4, 4), "channel", 0, 64, "all", None),
    "only-tail": (1, 1, 4, 1, 64, 0, 63, (4, 4), "channel", 0, 64, None, None),
    "nothing": (1, 1, 4, 1, 64, 0, 0, (4, 4), "channel", 0, 64, None, None),
}


def packed_case(case, dtype, bias=0.0):
    from hf_kvcache.kernels.quant_pack import reference as pack

    B, Hkv, G, S, D, N, M, bits, axis, k_group, v_group, kind, softcap = QUANT[case]
    q, k, v = random_case(B, Hkv, G, S, D, N, dtype, bias)
    _, tail_k, tail_v = random_case(B, Hkv, G, S, D, M, dtype)
    keys = pack.quant_pack(k, bits=bits[0], axis=axis, group_size=k_group or 32)
    values = pack.quant_pack(v, bits=bits[1], axis="token", group_size=v_group)
    # 13 spare rows of 5 groups or fewer: strides that are no multiple of 8 as well
    keys, values = ([in_larger_buffer(x, 13) for x in side] for side in (keys, values))
    arguments = {
        "bits": bits, "key_axis": axis, "scaling": D**-0.5,
        "mask": visible(B, Hkv, S, N + M, kind), "softcap": softcap,
    }  # fmt: skip
    return (q, keys, values, in_larger_buffer(tail_k, 3), in_larger_buffer(tail_v, 3)), arguments


def reference_in_float64(operands, arguments):
    from hf_kvcache.kernels.quant_attention import reference

    q, keys, values, tail_k, tail_v = operands
    return reference.quant_attention(q.double(), keys, values, tail_k.double(), tail_v.double(), **arguments)


@runs_kernels
@pytest.mark.parametrize("dtype", telling(LOW, "fp16"))
@pytest.mark.parametrize("case", telling(QUANT, "8bit-gqa7-s3-mask", "k4v2-80", "2bit-token-31"))
def test_quant_attention(case, dtype):
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.quant_attention import quant_attention

    dtype = DTYPES[dtype]
    operands, arguments = packed_case(case, dtype)
    with use_backend("triton"):
        out, lse = quant_attention(*operands, **arguments)
    expected_out, expected_lse = reference_in_float64(operands, arguments)
    assert out.shape == operands[0].shape and out.dtype == dtype and lse.dtype == torch.float32
    assert_close("out", expected_out, out, OUT[dtype])
    assert_close("lse", expected_lse, lse, LSE[dtype])


@runs_kernels
def test_spare_rows_are_not_read():
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.quant_attention import quant_attention

    (q, keys, values, *tail), arguments = packed_case("4bit-gqa4", DTYPES[LOW[-1] if ON_GPU else "fp32"])
    n = keys[0].shape[2] // 64 * 32
    cut = [[x[:, :, : x.shape[2] * n // side[0].shape[2]] for x in side] for side in (keys, values)]
    with use_backend("triton"):
        out, lse = quant_attention(q, keys, values, *tail, n_packed=n, **arguments)
        cut_out, cut_lse = quant_attention(q, *cut, *tail, **arguments)
    assert torch.equal(out, cut_out) and torch.equal(lse, cut_lse)


@runs_kernels
@pytest.mark.parametrize("size", [1e-6, 1e4], ids=["tiny-query", "huge-query"])
def test_queries_of_any_size_fit_float16(size):
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.quant_attention import quant_attention

    (q, *rest), arguments = packed_case("4bit-gqa4", DTYPES[LOW[-1] if ON_GPU else "fp32"], bias=300.0)
    # the scores keep their size: only the query grows
    arguments["scaling"] /= size * 300
    operands = [q.float().mul(size).to(q.dtype), *rest]
    with use_backend("triton"):
        out, lse = quant_attention(*operands, **arguments)
    expected_out, expected_lse = reference_in_float64(operands, arguments)
    assert_close("out", expected_out, out, OUT[q.dtype] * 5)
    assert_close("lse", expected_lse, lse, LSE[q.dtype] * 5)


@runs_kernels
def test_float16_weights_with_large_key_bias():
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.quant_attention import quant_attention

    operands, arguments = packed_case("4bit-gqa4", torch.float16, bias=30.0)
    with use_backend("triton"):
        out, lse = quant_attention(*operands, **arguments)
    expected_out, expected_lse = reference_in_float64(operands, arguments)
    assert_close("out", expected_out, out, 5e-3)
    assert_close("lse", expected_lse, lse, 2e-3)


@runs_kernels
@pytest.mark.parametrize("dtype", telling(DTYPES, "fp16"))
@pytest.mark.parametrize(
    ("axis", "group", "D", "bits"),
    [("channel", 32, 128, 4), ("channel", 32, 80, 2), ("channel", 32, 64, 8)]
    + [("token", 64, 128, 4), ("token", 32, 128, 2), ("token", 64, 64, 8), ("token", 96, 96, 4)],
    ids=lambda x: str(x),
)
def test_quant_pack_equals_the_reference_bit_by_bit(axis, group, D, bits, dtype):
    from hf_kvcache.kernels import use_backend
    from hf_kvcache.kernels.quant_pack import quant_pack, reference

    torch.manual_seed(bits)
    x = 3 * torch.randn(2, 2, 64 if axis == "channel" else 63, D, device=DEVICE)
    x[0, 0, :32] = 2.5
    x[0, 1, 0, 0] = float("nan")
    x[1, 0, 3, 7] = float("inf")
    x[1, 1, 5, 9] = 1e5
    x[1, 1, :, 3] += 300
    x = in_larger_buffer(x.to(DTYPES[dtype]), 3)
    with use_backend("triton"):
        got = quant_pack(x, bits=bits, axis=axis, group_size=group)
    expected = reference.quant_pack(x, bits=bits, axis=axis, group_size=group)
    for name, a, b in zip(("codes", "scale", "zero"), expected, got):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a[~a.isnan()], b[~a.isnan()]), name


@runs_kernels
def test_merge_of_many_splits_and_of_none():
    from hf_kvcache.kernels.merge_states import merge_states
    from hf_kvcache.kernels.merge_states.triton_kernel import merge_partials

    torch.manual_seed(0)
    P, B, H, S, D = 37, 1, 2, 2, 80
    like = torch.empty(B, H, S, D, device=DEVICE, dtype=torch.float16)
    out, lse = torch.randn(P, B * H * S, D, device=DEVICE), 5 * torch.randn(P, B * H * S, device=DEVICE)
    lse[:, 1], lse[3] = float("-inf"), float("-inf")
    got_out, got_lse = merge_partials(out, lse, like)
    states = [(o.view(B, H, S, D).double(), x.view(B, H, S)) for o, x in zip(out, lse)]
    expected_out, expected_lse = merge_states(states)
    assert_close("out", expected_out, got_out, 1e-3)
    assert_close("lse", expected_lse, got_lse, 1e-6)
    got_out, got_lse = merge_partials(out[:0], lse[:0], like)
    assert not got_out.any() and got_lse.isneginf().all()


@runs_kernels
def test_what_the_kernels_cannot_do_is_said():
    from hf_kvcache.kernels import BackendUnavailable, use_backend
    from hf_kvcache.kernels.quant_pack import quant_pack

    x = torch.randn(1, 1, 4, 128, device=DEVICE)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="whole fields"):
        quant_pack(x, bits=8, axis="token", group_size=32)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="3 bits"):
        quant_pack(x, bits=3, axis="token", group_size=32)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_assembly_extracts_the_fields_that_the_plain_code_does(bits):
    """The interpreter runs the plain branch, so the instructions of the other are executed here."""
    from hf_kvcache.kernels.quant_attention import fields

    n_fields = 16 // bits
    for word_pair in (0x00000000, 0xFFFFFFFF, 0x12345678, 0x9ABCDEF0):
        registers = {f"${n_fields}": word_pair}
        execute_ptx(getattr(fields, f"ASM_{bits}").value, registers)
        for f in range(n_fields):
            for half in (0, 16):
                word = word_pair >> half & 0xFFFF
                place = f * bits % 8
                code = word >> f * bits & (2**bits - 1)
                assert registers[f"${f}"] >> half & 0xFFFF == code << place


def execute_ptx(text, registers):
    """Run the three instructions that the kernels use, on a dictionary of 32-bit registers."""

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"(\w+)\.b32 ([^;]+);", text):
        operation, (target, *sources) = line[0], line[1].replace(" ", "").split(",")
        a, b, *rest = (value(x) for x in sources) if sources else (0, 0)
        if operation == "and":
            registers[target] = a & b
        elif operation == "shr":
            registers[target] = a >> b
        elif operation == "prmt":
            pool = (b << 32 | a).to_bytes(8, "little")
            picked = bytes(pool[rest[0] >> 4 * i & 7] for i in range(4))
            registers[target] = int.from_bytes(picked, "little")
        else:
            raise AssertionError(f"unknown instruction {operation}")
