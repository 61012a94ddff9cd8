"""Linear layers of 16 bits that multiply in float32."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield
    sys.modules.pop("wide_linear", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_sums_are_rounded_once(dtype, bias):
    from wide_linear import WideLinear

    torch.manual_seed(0)
    narrow, x = nn.Linear(96, 40, bias=bias).to(dtype), torch.randn(3, 5, 96).to(dtype)
    wide = WideLinear(narrow)
    exact = x.double() @ narrow.weight.double().T + (narrow.bias.double() if bias else 0)
    found = wide(x)
    assert found.dtype == dtype and wide.weight is narrow.weight and wide.bias is narrow.bias
    # half a step of the dtype, and what float32 rounds in between
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= 0.51 * step + 1e-5).all()


def test_only_layers_of_16_bits_where_there_are_no_products_of_them(monkeypatch):
    import wide_linear
    from cases import SIZES, new_model
    from transformers import LlamaConfig

    class Mkldnn:
        supported = False

        def _is_mkldnn_bf16_supported(self):
            return self.supported

    monkeypatch.setattr(torch.ops, "mkldnn", Mkldnn())
    # one of its own: those of `tiny_model` are shared by all tests
    model, ids = new_model(LlamaConfig(**SIZES)), torch.arange(3, 20)[None]
    assert not wide_linear.widen(model) and type(model.lm_head) is nn.Linear
    model = model.bfloat16()
    before = model(ids).logits
    Mkldnn.supported = True
    assert not wide_linear.widen(model)
    Mkldnn.supported = False
    assert wide_linear.widen(model) and type(model.lm_head) is wide_linear.WideLinear
    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(model(ids).logits, before, rtol=0.1, atol=0.05)
