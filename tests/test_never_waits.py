"""Decoding on a device never waits for it: no value is asked for, nothing is copied that blocks, whatever the cache."""

import pytest
import torch
from cases import ARCHITECTURES, CASES, new_model
from pretended import Pretended, decode, pretending, there


@pytest.fixture(scope="module")
def model():
    # in 16 bits, as Triton's kernels take rows
    return there(new_model(ARCHITECTURES["llama"](), dtype=torch.bfloat16))


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_waits(case, batch, model, monkeypatch):
    assert decode(model, case.make(), batch, monkeypatch) == {}


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
