"""Decoding of retrofitted models on a device never waits for it, while heads grow at their own pace."""

import pytest
import torch
from pretended import decode, there
from tiny_retrofits import CACHES, retrofitted

import hf_kvcache as kv

CODECS = {"dense": None, "quant8": kv.Quantize(8, axis="token")}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_no_step_waits(method, codec, batch, monkeypatch):
    model = retrofitted(method, window=3, bias=[0.5, -0.5], dtype=torch.bfloat16)
    cache = CACHES[method](codec=CODECS[codec])
    assert decode(there(model), cache, batch, monkeypatch) == {}
    heads = cache.layers[0].store.packed.lengths.held
    assert heads.max() > heads.min() + 8, "heads of one length would not show"
