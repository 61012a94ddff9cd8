"""The row of a decoded token: a model of what it means, and the C++ backend step by step."""

import pytest
import torch
from rooms import on_levels

from hf_kvcache.dmc.store import TrainedStore
from hf_kvcache.kernels import native, use_backend
from hf_kvcache.kernels.slot_step import place_rows, reference, slot_step
from hf_kvcache.stores.paged import PagedBuffer

REASON = native.why_no_compiler()
# without a compiler there is nothing to test; a source that does not compile must fail
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BACKENDS = ["reference", pytest.param("native", marks=needs_compiler)]


isa = on_levels()


def empty(B, H, delay):
    """Ring and lengths of heads that have seen nothing, as a store keeps them."""
    pending = torch.full((B, H, 1, delay + 1), -1, dtype=torch.int32)
    return pending[:, :, 0], torch.zeros(B, H, dtype=torch.int32)


def text(B, H, S, p=0.5, n_padding=()):
    """Decisions `[B, H, S]` of a text that is padded on the left, and which tokens are real `[B, S]`."""
    alpha = torch.rand(B, H, S) < p
    start = torch.tensor(list(n_padding) or [0] * B)
    is_real = torch.arange(S) >= start.unsqueeze(-1)
    # what hooks bring: nothing stands before the first token
    return alpha & (torch.arange(S) > start.unsqueeze(-1)).unsqueeze(1), is_real


def live_tokens(alpha, first, t, delay):
    """Which tokens the query of token `t` sees, by the definition: with no decision against them, or a late one."""
    return {s for s in range(first, t + 1) if s == t or not alpha[s + 1] or t <= s + delay}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_padding", [(), (0, 9)], ids=["whole", "padded"])
@pytest.mark.parametrize("delay", [0, 1, 5, 100])
def test_rows_hold_the_live_tokens_and_nothing_else(backend, delay, n_padding):
    """By a dict of rows and a set of tokens: none is lost, none is kept for too long, no row is unused."""
    B, H, S = 2, 2, 150
    torch.manual_seed(delay)
    alpha, is_real = text(B, H, S, 0.7, n_padding)
    pending, lengths = empty(B, H, delay)
    held = {(b, h): {} for b in range(B) for h in range(H)}
    with use_backend(backend):
        for t in range(S):
            slot = slot_step(alpha[..., t], is_real[:, t] if n_padding else None, pending, lengths, t)
            assert slot.dtype == torch.int32 and slot.shape == (B, H)
            for (b, h), rows in held.items():
                row = int(slot[b, h])
                if not is_real[b, t]:
                    assert row == -1
                    continue
                rows[row] = t
                first = int(is_real[b].int().argmax())
                now = live_tokens(alpha[b, h].tolist(), first, t, delay)
                # a row whose time is up is seen no more, and is taken by this very token
                assert sorted(rows.values()) == sorted(now), f"token {t} of head {b, h}"
                assert sorted(rows) == list(range(int(lengths[b, h]))), f"rows of head {b, h} at {t}"


def test_delay_0_merges_into_the_newest_row():
    alpha = torch.tensor([[[0, 1, 1, 0, 1, 0, 0]]], dtype=torch.bool)
    pending, lengths = empty(1, 1, 0)
    with use_backend("reference"):
        slots = [int(slot_step(alpha[..., t], None, pending, lengths, t)) for t in range(7)]
    assert slots == [0, 0, 0, 1, 1, 2, 3] and int(lengths) == 4


# delay, B, Hkv, share of decisions, share of padding anywhere
RUNS = [(0, 1, 8, 0.5, 0), (1, 2, 3, 0.9, 0.2), (5, 3, 2, 0.3, 0.5), (256, 1, 4, 0.9, 0), (256, 2, 1, 0.6, 0.1)]


@needs_compiler
@pytest.mark.parametrize("run", RUNS, ids=lambda r: "delay{}-b{}-h{}-p{}-padding{}".format(*r))
def test_native_is_the_reference_step_by_step(run):
    delay, B, H, p, padding = run
    torch.manual_seed(delay + B)
    S = 400
    alpha, is_real = torch.rand(B, H, S) < p, torch.rand(B, S) >= padding
    want, got = empty(B, H, delay), empty(B, H, delay)
    for t in range(S):
        real = is_real[:, t] if padding else None
        expected = reference.slot_step(alpha[..., t], real, *want, t)
        with use_backend("native"):
            slot = slot_step(alpha[..., t], real, *got, t)
        for name, a, b in zip(("slot", "pending", "lengths"), (expected, *want), (slot, *got), strict=True):
            assert torch.equal(a, b), f"{name} at {t}"


@needs_compiler
def test_every_instruction_set_and_strides_no_store_has(isa):
    torch.manual_seed(0)
    alpha = torch.rand(40, 3, 2) < 0.6
    wide = [torch.full((2, 4, 9), -1, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)]
    want, got = empty(2, 3, 3), (wide[0][:, 1:, 1::2], wide[1].T)
    for t in range(40):
        is_real = torch.rand(2, 2)[:, 1] < 0.8
        expected = reference.slot_step(alpha[t].T, is_real, *want, t)
        with use_backend("native"):
            assert torch.equal(expected, slot_step(alpha[t].T, is_real, *got, t))
        assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    assert (wide[0][:, 0] == -1).all() and (wide[0][..., ::2] == -1).all()


def rows(S, B, H, D, dtype=torch.float32):
    return torch.arange(1, S * B * H * D + 1).view(S, B, H, 1, D).to(dtype)


@pytest.mark.parametrize("n_padding", [(), (0, 9)], ids=["whole", "padded"])
def test_rows_are_placed_as_the_buffer_does(n_padding):
    """`place_rows` against `slot_step` and `PagedBuffer.put`; pages in an order of their own."""
    B, H, S, page = 2, 3, 40, 4
    torch.manual_seed(1)
    alpha, is_real = text(B, H, S, 0.5, n_padding)
    k, v = rows(S, B, H, 5), -rows(S, B, H, 3)
    buffer = PagedBuffer(("k", "v"), page)
    buffer.allocate(B, H, alpha.device)
    P = B * H * -(-S // page)
    table = torch.randperm(P).int().view(B, H, -1)
    pages = torch.zeros(P, 1, page, 5), torch.zeros(P, 1, page, 3)
    pending, (other_ring, lengths) = empty(B, H, 2)[0], empty(B, H, 2)
    for t in range(S):
        real = is_real[:, t] if n_padding else None
        row = {"k": k[t], "v": v[t]}
        slot = reference.slot_step(alpha[..., t], real, pending, buffer.lengths, t)
        buffer.follow_lengths(row)
        buffer.put(row, slot)
        with use_backend("reference"):
            place_rows(k[t], v[t], alpha[..., t], real, other_ring, lengths, t, *pages, table)
        n_written = [held.any(-1).sum() for held in pages]
        assert n_written == [lengths.sum()] * 2, f"written where no row is, token {t}"
    assert torch.equal(pending, other_ring) and torch.equal(buffer.lengths, lengths)
    for name, held in zip("kv", pages, strict=True):
        in_order = held.flatten(0, 2)[table.long().unsqueeze(-1) * page + torch.arange(page)].flatten(2, 3)
        n = buffer.n_tokens
        assert torch.equal(buffer.read(name), in_order[:, :, :n].masked_fill(~buffer.is_row.unsqueeze(-1), 0))


@pytest.mark.parametrize("delay", [0, 5])
def test_a_store_that_does_not_wait_holds_the_same(monkeypatch, delay):
    """The branch of a GPU, of which this one only pretends to be one."""
    B, H, S = 2, 2, 150
    torch.manual_seed(0)
    alpha, is_real = text(B, H, S, 0.6, (0, 9))
    stores = TrainedStore(page=16), TrainedStore(page=16)
    k, v = rows(S, B, H, 8), -rows(S, B, H, 8)
    for is_at_hand, store in zip((True, False), stores, strict=True):
        monkeypatch.setattr(PagedBuffer, "is_at_hand", is_at_hand)
        store.allocate(B, H, delay, alpha.device, torch.float32)
        store.head_dim = 8
        for t in range(S):
            store.place(k[t], v[t], alpha[..., t], is_real[:, t] if t < 9 else None, t)
        store.packed.look()
    (a, b), n = stores, stores[0].packed.n_tokens
    assert torch.equal(a.packed.lengths, b.packed.lengths) and torch.equal(a.pending, b.pending)
    for x, y in zip(a.rows(0, n), b.rows(0, n), strict=True):
        assert x.any() and torch.equal(x, y)


def test_operands_that_do_not_fit_are_refused():
    alpha, (pending, lengths) = torch.zeros(2, 3, dtype=torch.bool), empty(2, 3, 1)
    for bad in (
        (alpha[:1], None, pending, lengths),
        (alpha, None, pending[..., :0], lengths),
        (alpha, None, pending, lengths[0]),
    ):
        with pytest.raises(ValueError, match="delay \\+ 1"):
            slot_step(*bad, 0)
    with pytest.raises(ValueError, match="int32"):
        slot_step(alpha, None, pending.long(), lengths, 0)
    with pytest.raises(ValueError, match="is_real"):
        slot_step(alpha, torch.ones(3, dtype=torch.bool), pending, lengths, 0)
    k, pages, table = torch.zeros(2, 3, 1, 8), torch.zeros(6, 1, 4, 8), torch.zeros(2, 3, 1, dtype=torch.int32)
    for bad in ((pages.half(), pages), (pages[..., :7], pages), (pages, pages.mT.contiguous().mT), (pages, pages[:5])):
        with pytest.raises(ValueError, match="pages"):
            place_rows(k, k, alpha, None, pending, lengths, 0, *bad, table)
    with pytest.raises(ValueError, match="table"):
        place_rows(k, k, alpha, None, pending, lengths, 0, pages, pages, table.long())
