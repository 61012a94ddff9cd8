"""A check of retrofitted models: the dense model is the same one without compression."""

import pytest
import torch
from tiny_retrofits import retrofitted

from hf_kvcache.dmc import retrofits
from hf_kvcache.eval.checking import Check
from hf_kvcache.eval.running import Settings
from hf_kvcache.eval.specs import parse


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_a_retrofit_is_compared_with_itself(method):
    model = retrofitted(method, n_layers=2, dtype=torch.float32, bias=10.0, window=3).eval()
    model.set_attn_implementation("hf_kvcache")
    ids = torch.randint(5, 50, (1033,), generator=torch.Generator().manual_seed(0)).tolist()
    (own,) = Check(model, None, parse(method), Settings()).go_on([ids], 1000, 4)
    (dense,) = Check(model, None, parse("dense"), Settings()).go_on([ids], 1000, 4)
    assert own.deviation.kl > 1e-6 > dense.deviation.kl and dense.agreed == 4
    assert own.nbytes < dense.nbytes and own.dense_nbytes == dense.dense_nbytes
    assert all(child.compresses for child in retrofits(model).values())
