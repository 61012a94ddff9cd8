"""Decoding on a device never waits for it: no value is asked for, nothing is copied that blocks, whatever the cache."""

import pytest
import torch
from cases import ARCHITECTURES, CASES, new_model
from pretended import Pretended, decode, pretending, there

import hf_kvcache as kv


@pytest.fixture(scope="module")
def model():
    # in 16 bits, as Triton's kernels take rows
    return there(new_model(ARCHITECTURES["llama"](), dtype=torch.bfloat16))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_waits(case, batch, model, monkeypatch):
    assert decode(model, case.make(), batch, monkeypatch) == {}


# of the policies that evict by themselves, those of which the table has none
OTHERS = {name: dict(ratio=0.5) for name in ("tova", "l2norm", "lagkv", "rkv", "nacl", "random")} | {"fastgen": {}}


@pytest.mark.parametrize("name", OTHERS)
def test_no_step_of_other_policies_waits(name, model, monkeypatch):
    cache = kv.EvictionCache(name, **OTHERS[name], n_sink=2, n_recent=8, interval=4)
    assert decode(model, cache, 2, monkeypatch) == {}


def test_where_nothing_can_go_nothing_is_called_evicted(model, monkeypatch):
    """Within the budget a device need not be asked: all rows can be cropped."""
    cache = kv.EvictionCache("adakv", budget=256, window=4, n_sink=2, n_recent=8, interval=4)
    assert decode(model, cache, 2, monkeypatch) == {}
    assert [layer.evicted_at for layer in cache.layers] == [None, None]


def test_what_waits_is_seen(monkeypatch):
    with pretending(monkeypatch) as waits:
        x = Pretended(torch.arange(6.0))
        for ask in (
            lambda: x.sum().item(),
            lambda: bool((x > 3).any()),
            lambda: x[x > 3],
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: torch.tensor([1, 2], device=x.device),
            lambda: torch.zeros(2).to(x.device),
            lambda: x.nonzero(),
            lambda: x[torch.tensor([1, 2])],
            lambda: torch.equal(x, x),
        ):
            before = sum(waits.values())
            ask()
            assert sum(waits.values()) > before
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.zeros(6)
