"""Every attention op, backend and format: output and log-sum-exp are those of PyTorch in float64, with sinks too.

Heads share keys, batches are larger than one, lengths are odd, masks hide whole queries, and the head sizes of keys and
values differ. Where the Triton kernels run is said in `test_triton.py`.
"""

import importlib.util

import pytest
import torch
from attention_formats import FORMATS, HKV, B
from rooms import levels

from hf_kvcache.kernels import BackendUnavailable, native, use_backend
from hf_kvcache.kernels.merge_states import with_sink

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from test_triton import INTERPRETED, ON_GPU, run_in_the_interpreter
else:
    INTERPRETED = ON_GPU = False

G = 3
# channels of a key and of a value
SIZES = [(16, 16), (24, 16), (48, 32), (32, 48), (96, 64)]
KINDS = {"one": (1, False, None), "three-masked": (3, True, None), "two-masked-softcap": (2, True, 4.0)}
# what the Triton kernels leave to the reference
REFUSED = {
    "quant4-channel": "not a multiple of 16",
    "quant8k4v-token": "not a multiple of 16",
    "sparse-index": "Gluon",
    "ragged-index": "Gluon",
}

formats = pytest.mark.parametrize("form", FORMATS)


def expected(q, k, v, sinks, scaling, mask=None, softcap=None):
    """Attention by the formula, in float64; rows of NaN are none. A sink is one more column of the scores."""
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    is_row = ~k[..., 0].isnan()
    scores = q.double() @ k.nan_to_num().mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_row.unsqueeze(2), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(G, 1) if mask.shape[1] > 1 else ~mask, -torch.inf)
    found = []
    for column in (torch.full_like(sinks, -torch.inf), sinks):
        column = column.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        whole = torch.cat([scores, column], -1)
        found.append((whole.softmax(-1).nan_to_num()[..., :-1] @ v.nan_to_num(), whole.logsumexp(-1)))
    return found


def close(what, got, wanted, limit):
    wanted, got = wanted.double(), got.double()
    assert torch.equal(got.isinf(), wanted.isinf()), f"{what}: infinities"
    finite = ~wanted.isinf()
    assert not got.isnan().any(), f"{what}: NaN"
    error = (got - wanted)[finite].abs().max()
    assert error <= limit, f"{what}: {error:.1e} > {limit:.0e}"


def ask_each(form, size, limits):
    """All kinds of calls in every dtype of `limits`, which bound errors of numbers of the order of 1."""
    for dtype, limit in limits.items():
        for kind in KINDS:
            try:
                ask(form, size, kind, dtype, limit)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {size}, {dtype}: {error}") from error


def ask(form, size, kind, dtype, limit):
    torch.manual_seed(0)
    (D, Dv), (S, is_masked, softcap) = size, KINDS[kind]
    run, k, v = FORMATS[form](D, Dv, dtype)
    q = torch.randn(B, S, HKV * G, D).to(dtype).transpose(1, 2)
    options = {"scaling": D**-0.5, "softcap": softcap}
    if is_masked and not form.startswith("ragged"):
        options["mask"] = torch.rand(B, HKV, S, k.shape[2]) > 0.3
        options["mask"][0, 1, -1] = False
    sinks = torch.linspace(-1, 3, HKV * G)
    out, lse = run(q, **options)
    double = dtype == torch.float64
    assert lse.dtype == (dtype if double else torch.float32)
    assert out.dtype == (torch.promote_types(dtype, torch.float32) if form.startswith("lowrank") else dtype)
    assert out.shape == (B, HKV * G, S, Dv) and lse.shape == (B, HKV * G, S)
    plain, sunk = expected(q, k, v, sinks.double(), **options)
    for what, got, wanted in (("plain", (out, lse), plain), ("sink", with_sink(out, lse, sinks), sunk)):
        close(f"{what}: output", got[0], wanted[0], limit)
        # keys rebuilt for tensor cores are rounded to the dtype of the queries
        close(f"{what}: log-sum-exp", got[1], wanted[1], limit if double else max(limit, 3e-6))


@pytest.mark.skipif(INTERPRETED, reason="the same without the interpreter")
@formats
def test_reference(form):
    with use_backend("reference"):
        for size in SIZES:
            ask_each(form, size, {torch.float64: 1e-13, torch.float32: 3e-6})


@pytest.mark.skipif(INTERPRETED, reason="the same without the interpreter")
@formats
def test_float64_goes_to_the_reference_unasked(form):
    ask_each(form, (24, 16), {torch.float64: 1e-13})


@pytest.mark.skipif(INTERPRETED or native.why_no_compiler() is not None, reason="there is no compiler")
@formats
@pytest.mark.parametrize("isa", levels())
def test_native(form, isa, monkeypatch):
    monkeypatch.setenv("HF_KVCACHE_ISA", isa)
    native.forget()
    with use_backend("native"):
        for size in SIZES:
            ask_each(form, size, {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3})
    native.forget()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
@formats
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (48, 32), (32, 48)], ids=lambda s: f"k{s[0]}-v{s[1]}")
def test_triton(form, size):
    try:
        with use_backend("triton"):
            ask(form, size, "one", torch.float32, 2e-5)
            ask(form, size, "two-masked-softcap", torch.float16, 1e-2)
    except BackendUnavailable as refusal:
        assert form in REFUSED and REFUSED[form] in str(refusal)
        assert "Gluon" in REFUSED[form] or size[0] % 16
