"""Huge pages are asked for inside a tensor, never beyond it."""

import pytest
import torch

from hf_kvcache.kernels import pages


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(pages, "_madvise", lambda *arguments: calls.append(arguments))
    return calls


def test_whole_pages_inside_the_tensor(asked):
    t = torch.empty(5 * pages.HUGE_PAGE + 12345, dtype=torch.uint8)
    assert pages.on_huge_pages(t) is t
    [(start, n_bytes, _)] = asked
    assert start % pages.HUGE_PAGE == n_bytes % pages.HUGE_PAGE == 0
    assert t.data_ptr() <= start and start + n_bytes <= t.data_ptr() + t.numel()
    assert n_bytes >= 4 * pages.HUGE_PAGE


def test_small_tensors_and_other_devices_are_left_alone(asked):
    pages.on_huge_pages(torch.empty(pages.HUGE_PAGE, dtype=torch.uint8))
    pages.on_huge_pages(torch.empty(8 * pages.HUGE_PAGE, dtype=torch.uint8, device="meta"))
    assert not asked


def test_contents_survive():
    t = pages.on_huge_pages(torch.empty(3 * pages.HUGE_PAGE, dtype=torch.uint8)).fill_(7)
    assert (t == 7).all()
