"""Low-rank caches: what attention sees, where RoPE is, what is fitted when, and what is refused."""

import copy
import warnings

import cases
import pytest
import torch
from cases import (
    NAMED,
    SIZES,
    assert_close,
    assert_same_state,
    generate,
    new_model,
    padded,
    prompt,
    replay,
    splits,
    tiny_model,
)
from transformers import BartConfig, CohereConfig, DynamicCache, LlamaConfig, Phi3Config, SmolLM3Config

import hf_kvcache as kv
from hf_kvcache.adapters import Bases
from hf_kvcache.adapters.decompose import decompose
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.calibration import fit_bases
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.compat import cache_argument

ROPES = {
    "default": {"rope_theta": 10000.0, "rope_type": "default"},
    "linear": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
}


def bases_of(model, rank=0.5, length=128, n=3, **options):
    options = {"allocator": "uniform", "directions": "rows", "group_size_v": 1} | options
    return fit_bases(model, [prompt(1, length, seed=10 + i) for i in range(n)], rank=rank, **options)


def llama(rope="default", seed=0, **changes):
    return new_model(LlamaConfig(**SIZES | changes | {"rope_parameters": ROPES[rope]}), seed=seed)


@pytest.fixture(scope="module")
def bases():
    return bases_of(tiny_model("llama"), 1.0).truncated(8)


# -- what attention sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size_v", [1, "all"])
@pytest.mark.parametrize("start", [0, 100_000])
@pytest.mark.parametrize("rope", ROPES)
def test_equals_the_model_with_low_rank_weights(rope, start, group_size_v):
    """With `exact_prefill=False` the cache is the stock model whose projections were replaced by their factors."""
    model = llama(rope, hidden_size=96)
    bases = bases_of(model, group_size_v=group_size_v)
    ids = prompt(1, 90)
    positions = torch.arange(start, start + 90).unsqueeze(0)

    reference = copy.deepcopy(model)
    report = decompose(reference, bases)
    assert all(entry["replaced"] for entry in report), report
    expected = reference(ids, position_ids=positions).logits

    cache, logits = kv.LowRankCache(bases=bases, window=8, n_sink=0, exact_prefill=False), []
    for at in positions.split([50, 1, 1, 7, 31], 1):
        piece = ids[:, at[0, 0] - start : at[0, -1] - start + 1]
        logits.append(model(piece, position_ids=at, **cache_argument(cache)).logits)
    assert cache.layers[0].store.n_packed >= 32
    # at 100K the angles that the model computes in float32 are off by some thousandths of a radian
    assert_close("logits", torch.cat(logits, 1), expected, 2e-3 if start else 2e-4)
    # and the projection matters
    assert (expected - model(ids, position_ids=positions).logits).abs().max() > 0.05


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("group_size_v", [1, "all"])
@pytest.mark.parametrize("head_dim, rank", [(8, 4), (16, 16), (64, 16), (64, 48), (80, 32), (96, 64), (128, 112)])
def test_one_shot_chunks_and_single_tokens_agree(head_dim, rank, group_size_v, rope):
    model = llama(head_dim=head_dim, num_hidden_layers=1)
    bases = bases_of(model, 1.0, rope=rope, group_size_v=group_size_v)
    ids = prompt(2, 80)

    def run(sizes):
        cache = kv.LowRankCache(rank, bases=bases, rope=rope, window=8, n_sink=2, exact_prefill=False)
        return replay(model, cache, ids, sizes)

    one_shot = run([80])
    assert_close("chunks", run(splits(80, 13)), one_shot, 2e-4)
    assert_close("tokens", run([1] * 80), one_shot, 2e-4)


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_the_bytes_do_not_depend_on_how_a_text_was_fed(bases, rope):
    model = tiny_model("llama")
    bases = bases if rope == "pre" else bases_of(model, rope="post")
    ids = prompt(1, 100)

    def first_layer(sizes):
        cache = kv.LowRankCache(bases=bases, rope=rope, window=8)
        replay(model, cache, ids, sizes)
        return cache.layers[0].store

    one_shot, single = first_layer([100]), first_layer([1] * 100)
    n = min(one_shot.n_packed, single.n_packed)
    assert n >= 64
    for name, latents in one_shot.packed.views().items():
        assert_close(name, single.packed[name][:, :, :n], latents[:, :, :n], 1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_left_padded_rows_equal_themselves_alone(arch, rope):
    model = tiny_model(arch)
    bases = bases_of(model, rope=rope)
    ids, mask, rows = padded([90, 61])

    def cache():
        return kv.LowRankCache(bases=bases, rope=rope, window=8, n_sink=0, exact_prefill=False)

    together = replay(model, cache(), ids, [70, 1, 1, 18], mask)
    for i, row in enumerate(rows):
        n = row.shape[1]
        alone = replay(model, cache(), row, [n - 20, 1, 1, 18])
        assert_close(f"row {i}", together[i, -n:], alone[0], 3e-4)


def test_padding_between_turns_keeps_positions():
    """The second turn of a batch is padded, too: positions go on, slots do not."""
    model = tiny_model("llama")
    bases = bases_of(model)
    first, second = prompt(2, 70), prompt(2, 12, seed=2)
    mask = torch.ones(2, 82, dtype=torch.long)
    mask[0, 70:75] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(ids_of, mask_of, position_of):
        cache = kv.LowRankCache(bases=bases, window=4, n_sink=0, exact_prefill=False)
        for part in (slice(0, 70), slice(70, None)):
            stop = 70 if part.stop else mask_of.shape[1]
            out = model(
                ids_of[:, part],
                **cache_argument(cache),
                attention_mask=mask_of[:, :stop],
                position_ids=position_of[:, part],
            )
        # another forty tokens push the second turn out of the window
        more = prompt(1, 40, seed=3).expand(ids_of.shape[0], -1)
        stop = mask_of.shape[1]
        at = position_of[:, -1:] + torch.arange(1, 41)
        long_mask = torch.cat([mask_of, torch.ones(ids_of.shape[0], 40, dtype=torch.long)], 1)
        for i in range(40):
            out = model(
                more[:, i : i + 1],
                **cache_argument(cache),
                attention_mask=long_mask[:, : stop + i + 1],
                position_ids=at[:, i : i + 1],
            )
        assert cache.layers[0].store.n_packed > 82
        return out.logits[:, -1]

    together = run(torch.cat([first, second], 1), mask, positions)
    row = torch.cat([first[:1], second[:1, 5:]], 1)
    alone = run(row, torch.ones(1, 77, dtype=torch.long), torch.arange(77).unsqueeze(0))
    assert_close("padded row", together[:1], alone, 3e-4)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_quantised_latents_agree_with_what_they_decode_to(bits, rope):
    """The fused op against attention over decoded rows."""
    model = llama(head_dim=64, num_hidden_layers=1)
    bases = bases_of(model, rope=rope, group_size_v="all")
    cache = kv.LowRankCache(bases=bases, rope=rope, bits=bits, window=8)
    ids = prompt(2, 100)
    model(ids[:, :99], **cache_argument(cache))
    decoded = DynamicCache()
    decoded.update(*(rows.clone() for rows in cache.layers[0].store.logical_rows()), 0)
    ours = model(ids[:, 99:], **cache_argument(cache)).logits
    assert_close("logits", ours, model(ids[:, 99:], **cache_argument(decoded)).logits, 1e-4)


def test_rotation_is_folded_where_latents_are_quantised():
    model = llama(head_dim=64, num_hidden_layers=1)
    bases = bases_of(model, 1.0)
    ids = prompt(1, 200)

    def error(mix):
        rows = []
        for bits in (3, None):
            cache = kv.LowRankCache(bases=bases, bits=bits, mix=mix, window=8)
            model(ids, **cache_argument(cache))
            rows.append(cache.layers[0].store.logical_rows())
        return sum((a - b).square().sum().item() for a, b in zip(*rows))

    assert kv.LowRankCache(bits=3).codec[0].first.mix is True
    assert kv.LowRankCache().codec[0].mix is None
    # random weights have no outlying directions to speak of; a skewed basis does
    skewed = {
        i: {side: Basis(b.down * spread(b), b.up / spread(b).unsqueeze(-1), b.mean) for side, b in sides.items()}
        for i, sides in bases.layers.items()
    }
    bases = Bases(skewed, rope="pre")
    assert error(True) < 0.7 * error(False)


def spread(basis):
    return torch.logspace(1, -1, basis.rank)


# -- where bases come from ------------------------------------------------------------------------------------------


def test_without_a_basis_one_is_fitted_to_the_prompt_and_said_once(unsaid):
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="calibrate lowrank") as said:
        generate(model, prompt(1, 80), kv.LowRankCache(window=8))
    assert [warning.filename for warning in said if "calibrate" in str(warning.message)] == [cases.__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = kv.LowRankCache(window=8)
        generate(model, prompt(1, 80), cache)
    layer = cache.layers[0]
    constants = [t for side in ("keys", "values") for t in layer.store.constants(side).values()]
    rows = sum(buffer.nbytes for buffer in layer.store.buffers().values())
    assert constants and layer.nbytes == rows + sum(t.nbytes for t in constants)


def test_nothing_is_fitted_to_a_handful_of_tokens():
    model = tiny_model("llama")
    cache = kv.LowRankCache(window=0, n_sink=0)
    replay(model, cache, prompt(1, 31), [1] * 31)
    assert cache.layers[0].store.n_packed == 0
    replay(model, cache, prompt(1, 33), [1] * 33)
    assert cache.layers[0].store.n_packed > 0


def test_padding_has_no_say_in_what_is_fitted():
    model = tiny_model("llama")
    ids, mask, rows = padded([90, 90])
    ids = torch.cat([torch.zeros(2, 60, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros_like(mask[:, :60]), mask], 1)
    with_pads, without = kv.LowRankCache(window=8, n_sink=0), kv.LowRankCache(window=8, n_sink=0)
    replay(model, with_pads, ids, [150], mask)
    replay(model, without, torch.cat(rows), [90])
    for side in ("keys", "values"):
        ours, theirs = (getattr(cache.layers[0].store, side).basis for cache in (with_pads, without))
        # directions may change sign
        assert_close(side, *(basis.down @ basis.up.flatten(1, 1)[:, 0] for basis in (ours, theirs)), 1e-3)


def test_the_same_latents_as_the_adapter_that_the_model_carries(tmp_path):
    from hf_kvcache.adapters import attach

    model = new_model(LlamaConfig(**SIZES))
    bases = bases_of(model)
    bases.save(tmp_path)
    ids = prompt(1, 90)
    from_file = kv.LowRankCache.from_adapter(tmp_path, window=8)
    model(ids, **cache_argument(from_file))
    attach(model, bases)
    carried = kv.LowRankCache(window=8)
    model(ids, **cache_argument(carried))
    assert_same_state(from_file, carried)
    assert not carried.layers[0].store.keys.constants_in_cache
    # caches of one model share what was derived from its basis
    another = kv.LowRankCache(window=8)
    model(ids, **cache_argument(another))
    assert another.layers[0].store.keys.basis is carried.layers[0].store.keys.basis


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_where_keys_are_projected_comes_with_the_bases(rope, tmp_path):
    model = tiny_model("llama")
    bases_of(model, rope=rope).save(tmp_path)
    for cache in (kv.LowRankCache(adapter=tmp_path, window=8), kv.LowRankCache.from_adapter(str(tmp_path), window=8)):
        model(prompt(1, 90), **cache_argument(cache))
        assert cache.layers[0].store.keys.format == {"pre": "lowrank/rope", "post": "lowrank"}[rope]


def test_rank_truncates_the_basis(bases):
    model = tiny_model("llama")
    cache = kv.LowRankCache((4, 8), bases=bases, window=8)
    model(prompt(1, 90), **cache_argument(cache))
    store = cache.layers[1].store
    assert store.packed["k.latents"].shape == (1, 2, 64, 4)
    assert store.packed["v.latents"].shape == (1, 2, 64, 8)
    with pytest.raises(ValueError, match="calibrate with a larger rank"):
        model(prompt(1, 90), **cache_argument(kv.LowRankCache(12, bases=bases, window=8)))


def test_reset_and_copies(bases):
    model = tiny_model("llama")
    ids = prompt(1, 90)
    cache = kv.LowRankCache(window=8)
    model(ids, **cache_argument(cache))
    twin = copy.deepcopy(cache)
    assert twin.layers[0].store.keys.basis is cache.layers[0].store.keys.basis
    fitted = cache.layers[0].store.keys.basis
    cache.reset()
    assert cache.nbytes == 0
    model(prompt(1, 90, seed=4), **cache_argument(cache))
    assert cache.layers[0].store.keys.basis is not fitted
    follow = prompt(1, 1, seed=5)
    fresh = kv.LowRankCache(window=8)
    model(ids, **cache_argument(fresh))
    assert_close(
        "copy", model(follow, **cache_argument(twin)).logits, model(follow, **cache_argument(fresh)).logits, 1e-6
    )


# -- RoPE of all kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_layers_without_rope_are_projected_as_they_are(is_calibrated):
    config = SmolLM3Config(
        **SIZES | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False}
    )
    model = new_model(config)
    bases = bases_of(model, 1.0) if is_calibrated else None
    cache = kv.LowRankCache(1.0, bases=bases, window=8)
    ours = generate(model, prompt(1, 80), cache)
    formats = [layer.store.keys.format for layer in cache.layers]
    assert formats == ["lowrank/rope"] * 3 + ["lowrank"]
    reference = generate(model, prompt(1, 80), DynamicCache())
    assert torch.equal(ours.sequences, reference.sequences)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_text_is_refused_before_and_fine_after(kind):
    sizes = SIZES | {"head_dim": 16, "hidden_size": 64}
    if kind == "dynamic":
        parameters = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
        model = new_model(LlamaConfig(**sizes | {"rope_parameters": parameters}))
    else:
        sizes.pop("head_dim")
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        parameters = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 64} | factors
        model = new_model(Phi3Config(**sizes, rope_parameters=parameters, original_max_position_embeddings=64))
    with pytest.raises(ValueError, match=f'{kind} RoPE .* LowRank.rope="post"'):
        generate(model, prompt(1, 60), kv.LowRankCache(window=8))
    generate(model, prompt(1, 60), kv.LowRankCache(rope="post", window=8), max_new_tokens=4)


def test_a_rope_of_another_layout_is_refused():
    model = new_model(CohereConfig(**{name: value for name, value in SIZES.items() if name != "head_dim"}))
    with pytest.raises(ValueError, match="does not pair channel"):
        generate(model, prompt(1, 60), kv.LowRankCache(window=8))
    generate(model, prompt(1, 60), kv.LowRankCache(rope="post", window=8), max_new_tokens=4)


def test_positions_of_images_are_refused(bases):
    layer = kv.LowRankCache(bases=bases)._new_layer(0)
    view = layer.append(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
    with pytest.raises(ValueError, match=r"positions \[3, 1, 5\] are not"):
        layer.prepare(AttentionCall(view, None, position_ids=torch.zeros(3, 1, 5, dtype=torch.long)))


def test_padding_without_positions_is_refused(bases):
    layer = kv.LowRankCache(bases=bases)._new_layer(0)
    view = layer.append(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16))
    layer.prepare(AttentionCall(view, None))
    assert layer.store.dense["position_ids"][1, 0].tolist() == [0, 1, 2, 3, 4]
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="the batch is padded, and the model does not say"):
        layer.prepare(AttentionCall(view, None, mask))
    # after RoPE positions do not matter, whatever they look like
    layer = kv.LowRankCache(rope="post")._new_layer(0)
    view = layer.append(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16))
    layer.prepare(AttentionCall(view, None, mask, position_ids=torch.zeros(3, 2, 5, dtype=torch.long)))
    assert layer.store.dense["position_ids"][0, 0].tolist() == [-1, 1, 2, 3, 4]


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
def test_a_padded_batch_of_a_model_without_rope_needs_no_positions(implementation):
    sizes = dict(
        d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=SIZES["vocab_size"]
    )
    model = new_model(BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False), implementation)
    ids, mask, _ = padded([60, 47])
    expected = generate(model, ids, attention_mask=mask)
    cache = kv.LowRankCache(1.0, window=8)
    got = generate(model, ids, cache, attention_mask=mask)
    assert all(layer.store.n_packed and layer.rope is None for layer in cache.layers)
    assert got.sequences.tolist() == expected.sequences.tolist()
    # latents of all channels give the rows back to within rounding
    assert_close("logits", torch.stack(got.logits), torch.stack(expected.logits), 1e-3)


# -- what does not go together --------------------------------------------------------------------------------------


def test_joint_rows_and_a_policy_by_head(tmp_path):
    with pytest.raises(ValueError, match="KeyDiff drops tokens head by head, but LowRank.* shares rows"):
        kv.LowRankCache(group_size=(1, "all"), policy=kv.KeyDiff(budget=400))
    # the same where only the basis knows
    model = tiny_model("llama")
    joint = bases_of(model, group_size_v="all")
    cache = kv.LowRankCache(bases=joint, window=4, policy=kv.KeyDiff(budget=60, n_recent=8))
    with pytest.raises(ValueError, match="KeyDiff drops .* but the basis of the values is shared by 2"):
        model(prompt(1, 90), **cache_argument(cache))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: kv.LowRank(0.0), "neither a share"),
        (lambda: kv.LowRank(1.5), "neither a share"),
        (lambda: kv.LowRank(0), "neither a share"),
        (lambda: kv.LowRank(rope="middle"), '"pre" nor "post"'),
        (lambda: kv.LowRank(group_size=0), "neither a number of KV heads"),
        (lambda: kv.LowRank(group_size="some"), "neither a number of KV heads"),
        (lambda: kv.LowRankCache((1, 2, 3)), "neither one setting nor a pair"),
        (lambda: kv.LowRankCache(adapter="here", bases=object()), "two ways to say the same"),
        (lambda: kv.KVCache(exact_prefill=False), "there is none"),
        (lambda: kv.QuantCache(4, exact_prefill=False), "encodes every token as it comes"),
        (lambda: kv.Quantize(4) >> kv.LowRank(0.5), "leaves nothing that another codec can encode"),
        (lambda: kv.Dense() >> kv.LowRank() >> kv.LowRank(), "needs model"),
    ],
)
def test_arguments_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda bases: kv.LowRankCache(40, window=8), "more than the 16 channels"),
        (lambda bases: kv.LowRankCache(group_size=3, window=8), "does not divide 2 KV heads"),
        (lambda bases: kv.LowRankCache(bases=bases, rope="post"), "the basis is of keys pre-RoPE"),
        (lambda bases: kv.LowRankCache(bases=bases, group_size=2), "was made for 1"),
    ],
)
def test_bases_that_do_not_fit(bases, make, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("llama")(prompt(1, 90), **cache_argument(make(bases)))


def test_chains_compose(bases):
    """Sparse latents, quantised values beside latents: any pair of sides, through the model."""
    model = tiny_model("llama", NAMED)
    ids = prompt(1, 90)
    pairs = [
        (kv.LowRank(8) >> kv.Sparse(keep=4), kv.LowRank(8)),
        (kv.LowRank(8), kv.Quantize(8)),
        (kv.Quantize(8, axis="token"), kv.LowRank(8) >> kv.Quantize(8)),
        (kv.Dense(), kv.LowRank(8)),
        (kv.LowRank(8, rope="post"), kv.Dense()),
        (kv.Quantize(8), kv.LowRank(8)),
    ]
    for pair in pairs:
        cache = kv.KVCache(codec=pair, window=8)
        generate(model, ids, cache)
        assert cache.layers[0].store.n_packed >= 64
