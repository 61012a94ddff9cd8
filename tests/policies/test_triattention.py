"""TriAttention: the logits of the centre of the queries over all distances, and what the rest of a query adds."""

import cmath
from types import SimpleNamespace

import cases
import pytest
import torch
from safetensors.torch import save_file
from toys import CALLS, HEADS, ROPES, SIZE, alone, assert_scores, feed, pairs

import hf_kvcache as kv
from hf_kvcache.policies import query_statistics
from hf_kvcache.policies.query_centres import centres_of
from hf_kvcache.rope import Rope
from hf_kvcache.shards import WHOLE

INV_FREQ = torch.tensor([1.0, 0.1, 0.01])  # of 8 channels 6 turn
KNOBS = dict(budget=100, n_sink=2, n_recent=4, interval=4)


def bound(rope, **knobs):
    return kv.TriAttention(**KNOBS | knobs).for_model(SimpleNamespace(rope=lambda: rope, shard=WHOLE))


def complexes(row, rope):
    """A row of 8 channels as 4 complex numbers, one by one."""
    couples = [(0, 4), (1, 5), (2, 6), (3, 7)] if rope is None else [(0, 3), (1, 4), (2, 5), (6, 7)]
    return [complex(row[i], row[j]) for i, j in couples]


def turns(rope, position):
    """What RoPE multiplies the 4 numbers with at a position, without the model's factor."""
    if rope is None:
        return [1.0] * 4
    angles = [*(position * INV_FREQ.double()).tolist(), 0.0]
    return [cmath.exp(1j * angle) for angle in angles]


def logits(rope, q, k, offsets):
    """The published score of keys `[n, 8]` as they are stored, for one query head `[n, 8]`: offset by offset."""
    scale = [1.0] * 4 if rope is None else [rope.scaling] * 3 + [1.0]
    taken_back = [
        [x / turn / s for x, turn, s in zip(complexes(row, rope), turns(rope, i), scale)] for i, row in enumerate(q)
    ]
    centre = [sum(column) / len(q) for column in zip(*taken_back)]
    size = [sum(abs(x) for x in column) / len(q) for column in zip(*taken_back)]
    found = []
    for row in k:
        # the paper's keys are without the factor, which is squared in the weights
        key = [x / s for x, s in zip(complexes(row, rope), scale)]
        series = 0.0
        for offset in offsets:
            turned = [c * turn for c, turn in zip(centre, turns(rope, len(q) - 1 + offset))]
            series += sum(s * s * (c * x.conjugate()).real for c, x, s in zip(turned, key, scale)) / len(offsets)
        rest = sum(s * s * (a - abs(c)) * abs(x) for a, c, x, s in zip(size, centre, key, scale))
        found.append(series + rest)
    return torch.tensor(found)


def formula(rope, offsets=tuple(2**i for i in range(17)), n_sink=2, n_recent=4):
    def score(toy, b, h):
        q, k, _ = (t.double() for t in toy.of(b, h))
        scores = []
        for head in q:
            found = logits(rope, head.tolist(), k.tolist(), offsets)
            own = found[n_sink : len(k) - n_recent]
            # rows that stay are not scored
            scores.append(torch.zeros(len(k), dtype=torch.float64))
            scores[-1][n_sink : len(k) - n_recent] = (own - own.mean()) / own.std(correction=0)
        return torch.stack(scores).amax(0).float()

    return score


@CALLS
@ROPES
def test_score_is_the_formula(scaling, sizes, monkeypatch):
    monkeypatch.setattr(query_statistics, "QUERIES", 16)
    rope = None if scaling is None else Rope(INV_FREQ, scaling)
    # what pads hold is not looked at
    assert_scores(feed(bound(rope), sizes=sizes, fill=float("nan")), formula(rope), 1e-4)


def test_offsets_are_powers_of_two_up_to_the_farthest():
    rope = Rope(INV_FREQ)
    assert_scores(feed(bound(rope, n_future=10)), formula(rope, (1, 2, 4, 8)), 1e-4)
    assert_scores(feed(bound(rope, n_future=1)), formula(rope, (1,)), 1e-4)


def test_worth_is_a_trigonometric_series_in_the_distance():
    """Equal keys under queries that all sit at one point before RoPE: nothing but the distance tells them apart."""
    rope = Rope(INV_FREQ)
    layer = kv.KVLayer(0, policy=bound(rope, n_future=1, n_sink=0, n_recent=0))
    one = torch.ones(1, 1, 1, SIZE)
    where = torch.arange(20).view(1, 1, 20)
    rows = rope.rotate(one.expand(1, 1, 20, SIZE), where)
    view = layer.append(rows.expand(1, HEADS, 20, SIZE), rows.expand(1, HEADS, 20, SIZE))
    layer.policy.on_queries(rows.expand(1, HEADS, 20, SIZE), view)
    scores = layer.policy.score(view)[0, 0]
    # the distance is d = 1 + 19 - i, and all pairs hold the same length: the cosines of d times the frequencies
    distance = torch.arange(20, 0, -1)
    series = (distance.unsqueeze(-1) * INV_FREQ).cos().sum(-1)
    assert torch.allclose(scores, (series - series.mean()) / series.std(correction=0), atol=1e-4)
    # the fastest pair has turned once, the others hardly
    assert scores.argmax() == 14


def test_a_padded_row_is_the_row_alone_while_rows_go():
    rope, sizes = Rope(INV_FREQ), [30] + [1] * 20
    # with no sinks the first tokens go, and with them what says where the row starts
    toy = feed(bound(rope, budget=12, n_sink=0), sizes=sizes, pads=(0, 13))
    single = alone(toy, 1, bound(rope, budget=12, n_sink=0), [17] + [1] * 20)
    assert torch.equal(toy.layer.store.positions[1] - 13, single.layer.store.positions[0])
    assert toy.view.layer_state["n_pads"].squeeze().tolist() == [[0, 0], [13, 13]]


def test_centres_of_a_text_serve_another(tmp_path):
    rope = Rope(INV_FREQ)
    text = feed(bound(rope), n=40, pads=(0, 7), seed=5)
    save_file(centres_of(SimpleNamespace(layers=[text.layer, object()])), tmp_path / "centres.safetensors")
    toy = feed(bound(rope, centres=str(tmp_path / "centres.safetensors")), sizes=[30, 19, 1])
    sums = toy.view.layer_state["sums"]
    assert torch.equal(sums[0], text.view.layer_state["sums"].sum(0)) and torch.equal(sums[0], sums[1])
    # the queries of this text change nothing, where they are changes all
    own = feed(bound(rope), sizes=[30, 19, 1])
    assert (toy.policy.score(toy.view) - own.policy.score(own.view)).abs().max() > 0.1
    for b, h in pairs(toy):
        taken = torch.cat([text.of(i, h)[0] for i in range(2)], 1)
        assert sums[b, h, 0, :, 0, 2].allclose(_lengths(taken), rtol=1e-4)


def _lengths(q):
    """Sizes of the first pair, summed over queries `[G, n, 8]`: RoPE does not change them."""
    return (q[..., 0] ** 2 + q[..., 3] ** 2).sqrt().sum(1)


def test_centres_of_other_heads_are_refused(tmp_path):
    save_file({"3": torch.zeros(HEADS, 1, 5, SIZE // 2, 3)}, tmp_path / "centres.safetensors")
    with pytest.raises(ValueError, match="a model of other heads"):
        feed(bound(None, centres=str(tmp_path / "centres.safetensors")))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_queries_of_a_model_are_unrotated(arch, tmp_path):
    """The sums are those of the model's own queries without RoPE, padded or not; saved, they serve the model."""
    model = cases.new_model(cases.ARCHITECTURES[arch]())
    module = model.model.layers[1].self_attn
    seen = []
    # what feeds RoPE: the projection, or the norm behind it
    source = getattr(module, "q_norm", module.q_proj)
    hook = source.register_forward_hook(lambda *a: seen.append(a[-1]))
    ids, mask, _ = cases.padded([40, 33])
    cache = kv.KVCache(policy=kv.TriAttention(**KNOBS))
    cases.replay(model, cache, ids, [20, 20], mask)
    hook.remove()
    q = torch.cat([x.reshape(2, 20, 2, 2, 16) for x in seen], 1)  # [B, S, Hkv, G, D]
    found = cache.layers[1].store.layer_state.views()["sums"].squeeze(2)
    for b, n_pads in enumerate([0, 7]):
        real, imaginary = q[b, n_pads:, ..., :8], q[b, n_pads:, ..., 8:]
        expected = torch.stack([real, imaginary, (real**2 + imaginary**2).sqrt()], -1).sum(0)
        assert torch.allclose(found[b], expected, rtol=1e-3, atol=2e-3)
    save_file(centres_of(cache), tmp_path / "centres.safetensors")
    served = kv.EvictionCache("triattention", centres=str(tmp_path / "centres.safetensors"), **KNOBS | {"budget": 24})
    out = cases.generate(model, ids, served, attention_mask=mask)
    assert torch.stack(out.logits).isfinite().all() and cache.layers[1].store.n_kept == 40
    assert served.layers[1].store.n_kept < 32


def test_shorter_than_what_stays():
    toy = feed(bound(Rope(INV_FREQ), n_sink=6), n=4, pads=(0, 2))
    assert toy.policy.score(toy.view).isfinite().all()


def test_knobs_are_checked():
    with pytest.raises(ValueError, match="n_future"):
        kv.TriAttention(budget=200, n_future=0)
