"""A text at once, token by token, and in any pieces: all as it is written on paper."""

import pytest
import torch
from rooms import telling
from tiny_retrofits import CACHES, batch, feed, lengths, on_paper, recorded, retrofitted, whole

from hf_kvcache.stores import PagedBuffer

ROWS = [17, 11, 3]

FORMS = {
    "dmc-w12-g1-borrowed": dict(G=1),
    "dmc-w1-g4-borrowed": dict(window=1, G=4),
    "dmc-w0-g2-borrowed": dict(window=0),
    "dmc-w3-g4-rows": dict(window=3, G=4, decision="rows", bias=[0.1]),
    "dmc-w0-g1-rows": dict(window=0, G=1, decision="rows", bias=[0.3, 0.1, -0.1, -0.3]),
    "dmc-w12-g4-linear": dict(G=4, decision="linear", bias=[0.2]),
    "dmc-w2-g2-linear": dict(window=2, decision="linear", bias=[0.2, -0.2]),
    "dmc-w3-g1-borrowed-mixed": dict(window=3, G=1, bias=[0.6, 0.2, -0.2, -0.6]),
    "dmc-w3-g2-borrowed-zero": dict(window=3, zero_after_rope=True),
    "dmc-w3-g2-borrowed-layer": dict(window=3, per="layer", bias=[0.4, -0.2]),
    "dmc-w12-g2-borrowed-neuron0": dict(neuron=0),
    "dms-w0-g2-borrowed": dict(method="dms", window=0),
    "dms-w1-g4-borrowed": dict(method="dms", window=1, G=4),
    "dms-w5-g1-borrowed-zero": dict(method="dms", window=5, G=1, zero_after_rope=True),
    "dms-w2-g4-borrowed-zero": dict(method="dms", window=2, G=4, zero_after_rope=True),
    "dms-w5-g4-rows": dict(method="dms", window=5, G=4, decision="rows", bias=[0.05]),
    "dms-w1-g2-rows-layer": dict(method="dms", window=1, decision="rows", per="layer", bias=[0.2, -0.05]),
    "dms-w2-g1-linear-mixed": dict(method="dms", window=2, G=1, decision="linear", bias=[0.5, 0.1, -0.1, -0.5]),
    "dms-w14-g2-linear": dict(method="dms", window=14, decision="linear", bias=[0.5, 0.0]),
    "dms-w40-g2-borrowed": dict(method="dms", window=40),
}


class Form:
    """A model, a padded batch, and what its attention gives on paper."""

    def __init__(self, knobs):
        self.model = retrofitted(**knobs)
        self.cache = CACHES[knobs.get("method", "dmc")]
        self.inputs = batch(ROWS)
        self.is_real = self.inputs[1].bool()
        with recorded(self.model) as seen:
            self.logits = whole(self.model, *self.inputs)
        (hidden,), (self.output,) = seen[0]
        self.on_paper, self.n_rows = on_paper(self.model.model.layers[0].self_attn, hidden, *self.inputs[1:])

    def check(self, sizes):
        cache = self.cache()
        logits = feed(self.model, cache, *self.inputs, sizes)
        worst = (logits - self.logits)[self.is_real].abs().max()
        assert worst <= 1e-10, f"pieces of {sizes}: off by {worst:.1e}"
        assert torch.equal(lengths(cache)[0], self.n_rows), f"pieces of {sizes}"


@pytest.fixture(params=FORMS.values(), ids=FORMS, scope="module")
def form(request):
    with torch.no_grad():
        return Form(request.param)


@torch.no_grad()
def test_a_text_at_once(form):
    worst = (form.output - form.on_paper)[form.is_real].abs().max()
    assert worst <= 1e-10
    # decisions matter: both kinds are made, and attention is far from that of the model without them
    n = torch.tensor(ROWS).unsqueeze(-1)
    window = form.model.model.layers[0].self_attn.kv_dmc.settings.delay
    assert (form.n_rows < n).any() or window >= max(ROWS)
    assert (form.n_rows > 1 + window).any() or window >= 14
    for child in (layer.self_attn.kv_dmc for layer in form.model.model.layers):
        child.compresses = False
        dense = whole(form.model, *form.inputs)
        child.compresses = True
    assert (dense - form.logits)[form.is_real].abs().max() > 1e-3 or window >= max(ROWS)


@torch.no_grad()
def test_token_by_token(form):
    form.check([1] * 17)


@torch.no_grad()
@pytest.mark.parametrize("size", telling(range(2, 18), 2, 5, 16, 17))
def test_a_prompt_of_any_length(form, size):
    form.check([size] + [1] * (17 - size))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_any_pieces(form, seed):
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(16, generator=generator)[: 1 + seed % 3] + 1
    ends = [0, *cuts.sort().values.tolist(), 17]
    form.check([b - a for a, b in zip(ends, ends[1:])])


@torch.no_grad()
def test_chunks_between_decoded_tokens(form):
    form.check([1, 1, 4, 1, 1, 1, 5, 3])


@torch.no_grad()
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_layers_in_a_row(method):
    model = retrofitted(method, n_layers=3, window=3)
    inputs, cache = batch(ROWS), CACHES[method]()
    with recorded(model) as seen:
        logits = feed(model, cache, *inputs, [6, 1, 1, 9])
    is_real = inputs[1].bool()
    for i, (hidden, outputs) in seen.items():
        expected, n_rows = on_paper(model.model.layers[i].self_attn, torch.cat(hidden, 1), *inputs[1:])
        assert (torch.cat(outputs, 1) - expected)[is_real].abs().max() <= 1e-10
        assert torch.equal(lengths(cache)[i], n_rows)
    assert (logits - whole(model, *inputs))[is_real].abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("method, window", [("dmc", 12), ("dmc", 0), ("dms", 30)])
def test_longer_than_a_block(method, window):
    # bands of 64 tokens in `merge`, blocks of 256 queries in attention, pages of 32 rows
    model = retrofitted(method, window=window, bias=[0.5, 0.0])
    inputs = batch([300, 230])
    is_real = inputs[1].bool()
    with recorded(model) as seen:
        logits = whole(model, *inputs)
    expected, n_rows = on_paper(model.model.layers[0].self_attn, seen[0][0][0], *inputs[1:])
    assert (seen[0][1][0] - expected)[is_real].abs().max() <= 1e-10
    for sizes in ([300], [260, 40], [60, 70, 1, 169]):
        cache = CACHES[method]()
        assert (feed(model, cache, *inputs, sizes) - logits)[is_real].abs().max() <= 1e-10
        assert torch.equal(lengths(cache)[0], n_rows)


# -- while only the device knows how long heads are ----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method, window", [("dmc", 3), ("dms", 5)])
def test_without_waiting_for_lengths(method, window, monkeypatch):
    monkeypatch.setattr(PagedBuffer, "is_at_hand", False)
    model = retrofitted(method, window=window, bias=[0.5, 0.2])
    inputs = batch([120, 90])
    cache, is_real = CACHES[method](), inputs[1].bool()
    logits = feed(model, cache, *inputs, [7] + [1] * 80 + [9] + [1] * 24)
    assert (logits - whole(model, *inputs))[is_real].abs().max() <= 1e-10
    packed = cache.layers[0].store.packed
    # estimates are never below, and the pages that they have taken too many come back
    assert (packed.counts >= packed.lengths).all() and packed.n_rows > int(packed.lengths.sum())
    packed.look()
    assert packed.counts.tolist() == packed.lengths.tolist()
    in_use = int((-(-packed.counts // packed.page)).sum())
    assert packed.n_pages == 1 + in_use + packed.free.numel()
