"""FlexAttention of relaxed decisions against the bias of T * T; forward only, as CPUs have no backward pass of it."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from hf_kvcache.dmc import Settings
from hf_kvcache.dmc.attention import attend_parallel
from hf_kvcache.dmc.flex import attend_flex, can_attend


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("n_padding", [0, 31])
@pytest.mark.parametrize(("method", "window"), [("dmc", 12), ("dms", 16)])
def test_equals_the_dense_bias(method, window, n_padding, softcap):
    generator = torch.Generator().manual_seed(0)
    T = 200
    q, k, v = (torch.randn(2, heads, T, 16, generator=generator) for heads in (4, 2, 2))
    left = torch.nn.functional.logsigmoid(3 * torch.randn(2, 2, T, generator=generator))
    is_real = mask = None
    if n_padding:
        is_real = torch.arange(T) >= torch.tensor([[0], [n_padding]])
        mask = torch.ones(T, T, dtype=torch.bool).tril() & is_real[:, None, None]
    settings = Settings(method, window=window)
    call = SimpleNamespace(settings=settings, is_relaxed=True, left=left, is_real=is_real)
    expected = attend_parallel(q, k, v, mask, call, 0.25, softcap)
    found = attend_flex(q, k, v, left, is_real, settings.delay, scaling=0.25, softcap=softcap, run=flex_attention)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = attend_flex(q, k, v, 1.1 * left, is_real, settings.delay, scaling=0.25, softcap=softcap, run=flex_attention)
    assert (other - expected).abs().max() > 1e-3


def test_is_left_to_gpus():
    assert not can_attend(torch.zeros(1, 1, 256, 16), 0.0)
