"""Layers that share one row of latents: what is kept, that nothing is lost at full rank, and what is refused."""

import copy

import pytest
import torch
from cases import (
    SIZES,
    assert_close,
    assert_same_state,
    generate,
    new_model,
    padded,
    prompt,
    replay,
    state,
    tiny_model,
)
from transformers import DynamicCache, LlamaConfig, SmolLM3Config

import hf_kvcache as kv
from hf_kvcache import persist
from hf_kvcache.codecs.fitting import Moments
from hf_kvcache.codecs.joint import fit_jointly
from hf_kvcache.compat import cache_argument
from hf_kvcache.rope import Rope
from hf_kvcache.stores import SharedStore

ARCHS = ["llama", "qwen2", "gemma3"]
WIDTH = 64  # channels of two layers of the tiny models
N = 200


def shared(rank=0.5, **options):
    return kv.LowRankCache(rank, **{"share_layers": 2, "window": 8, "n_sink": 2} | options)


def filled(cache, ids=None, model=None):
    (model or tiny_model())(prompt(2, N) if ids is None else ids, **cache_argument(cache))
    return cache


def stores(cache):
    return [layer.store for layer in cache.layers if isinstance(layer, kv.KVLayer)]


def groups(cache):
    """Layer numbers by group, in order, from the stores themselves."""
    all_stores = [layer.store if isinstance(layer, kv.KVLayer) else None for layer in cache.layers]
    return [[all_stores.index(s) for s in store.group] for store in stores(cache) if store.group[0] is store]


def deep_llama(n_layers, **changes):
    return new_model(LlamaConfig(**SIZES | {"num_hidden_layers": n_layers} | changes))


# -- nothing is lost at full rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("arch", ARCHS)
def test_full_rank_equals_dynamic_cache(arch, rope):
    model, ids, sizes = tiny_model(arch), prompt(2, 260), [180, 1, 1, 1, 7, 50] + [1] * 20
    cache = shared(1.0, rope=rope)
    ours = replay(model, cache, ids, sizes)
    assert_close("logits", ours, replay(model, DynamicCache(config=model.config), ids, sizes), 1e-4)
    first, second = stores(cache)
    assert first.n_packed >= 224 and first.packed is second.packed
    assert first.packed["k.latents"].shape == (2, 1, first.n_packed, WIDTH)
    # and less than that loses something
    assert (ours - replay(model, shared(0.5, rope=rope), ids, sizes)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_left_padded_batch(arch):
    model, (ids, mask, _) = tiny_model(arch), padded([N, 140])
    sizes = [170] + [1] * 30
    cache = shared(1.0)
    ours = replay(model, cache, ids, sizes, mask)
    reference = replay(model, DynamicCache(config=model.config), ids, sizes, mask)
    assert cache.layers[-1].store.n_packed >= 160
    for row, n in enumerate((N, 140)):
        assert_close(f"row {row}", ours[row, -n:], reference[row, -n:], 1e-4)


def test_layers_with_and_without_rope_share():
    model = new_model(
        SmolLM3Config(**SIZES | dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], use_sliding_window=False))
    )
    cache = shared(1.0)
    ours = generate(model, prompt(1, N), cache, max_new_tokens=60)
    assert [store.keys.format for store in stores(cache)] == ["lowrank/rope"] * 3 + ["lowrank"]
    assert groups(cache) == [[0, 1], [2, 3]]
    assert torch.equal(ours.sequences, generate(model, prompt(1, N), DynamicCache(), max_new_tokens=60).sequences)


def test_a_verification_that_no_crop_followed():
    """The first layers then have new rows before the last one has packed the old."""
    model, ids, sizes = tiny_model(), prompt(1, 260), [N, 30, 1, 1, 28]
    cache = shared(1.0)
    cache.activate_past_recording()
    ours = replay(model, cache, ids, sizes)
    assert_close("logits", ours, replay(model, DynamicCache(), ids, sizes), 1e-4)
    assert stores(cache)[0].n_packed >= 192


# -- what is kept ----------------------------------------------------------------------------------------------------


def principal_rows(rows, rank, n_fit):
    """Rows `[n, W]` projected on the principal directions of the first `n_fit`, in float64."""
    rows = rows.double()
    mean = rows[:n_fit].mean(0)
    directions = torch.linalg.svd(rows[:n_fit] - mean, full_matrices=False).Vh[:rank]
    return (rows - mean) @ directions.T @ directions + mean


@pytest.mark.parametrize("length", [70, N])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_prompt_rows_are_the_joint_principal_components(rope, length):
    ids = prompt(2, length)
    cache, dense = filled(shared((8, 16), rope=rope), ids), filled(kv.KVCache(), ids)
    n = cache.layers[0].store.n_packed
    assert n >= 32
    rotary = Rope(10000.0 ** (-torch.arange(8) / 8))
    at = torch.arange(length).expand(2, 1, length)
    for side, rank in (("k", 8), ("v", 16)):
        rows = [store.dense[side] for store in stores(dense)]  # [B, Hkv, T, D]
        if side == "k" and rope == "pre":
            rows = [rotary.unrotate(x, at) for x in rows]
        joint = torch.cat([x.transpose(1, 2).flatten(2) for x in rows], 2)[:, 2:]  # [B, T - n_sink, W], no sinks
        expected = principal_rows(joint.flatten(0, 1), rank, None).unflatten(0, (2, -1))[:, :n].float()
        for i, store in enumerate(stores(cache)):
            theirs = expected[..., i * 32 : i * 32 + 32].unflatten(2, (2, 16)).transpose(1, 2)  # [B, Hkv, n, D]
            if side == "k" and rope == "pre":
                theirs = rotary.rotate(theirs, at[..., 2 : 2 + n])
            assert_close(f"{side} of layer {i}", store.rows(0, n)[side == "v"], theirs, 2e-4)


def test_tokens_one_by_one_are_projected_like_a_prompt():
    """The stores alone: what is packed later goes on the directions of the prompt, whatever the steps."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 2, 1, 2, 300, 16, generator=generator)  # layer, side, [B, Hkv, T, D]

    def packed(sizes):
        codec = kv.LowRank(24, rope="post", share_layers=2)
        pair = [
            SharedStore(codec.for_side("k").for_shape(2, 16), codec.for_side("v").for_shape(2, 16), window=8)
            for _ in "ab"
        ]
        for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
            for store, (k, v) in zip(pair, rows[..., start : start + size, :], strict=True):
                store.append(k, v)
                if not store.group:
                    store.join(pair[0], 2)
                store.pack()
        return pair

    pair = packed([100] + [1] * 200)
    n = pair[0].n_packed
    assert n == 288 and pair[1].n_kept == 300
    for side in range(2):
        joint = torch.cat([x[side, 0].transpose(0, 1).flatten(1) for x in rows], 1)  # [T, W]
        expected = principal_rows(joint, 24, 100)[:n].float().split(32, 1)
        for store, theirs in zip(pair, expected, strict=True):
            assert_close("rows", store.rows(0, n)[side][0], theirs.unflatten(1, (2, 16)).transpose(0, 1), 1e-4)
    for size in (7, 100):
        other = packed([100] + [size] * (200 // size))
        m = min(n, other[0].n_packed)
        for name, latents in pair[0].packed.views().items():
            assert_close(name, other[0].packed[name][:, :, :m], latents[:, :, :m], 1e-5)


def test_parts_are_rounded_once_they_have_been_added_up():
    rows = torch.randn(4, 1, 2, 200, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    codec = kv.LowRank(24, rope="post", share_layers=4).for_shape(2, 16)
    group = [SharedStore(codec, codec, window=8) for _ in rows]
    for store, x in zip(group, rows, strict=True):
        store.append(x, x)
        store.join(group[0], 4)
        store.pack()
    n = group[0].n_packed
    parts = [
        store.keys.basis.encode(x.float().transpose(1, 2).flatten(2)[:, None, :n]) for store, x in zip(group, rows)
    ]
    assert n == 192 and torch.equal(group[3].packed["k.latents"], sum(parts).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model, ids, sizes = tiny_model("llama", dtype=dtype), prompt(2, 230), [N] + [1] * 30
    exact = replay(tiny_model(), DynamicCache(), ids, sizes)
    cache = shared(1.0)
    ours, stock = (replay(model, c, ids, sizes) for c in (cache, DynamicCache()))
    assert cache.layers[1].store.packed["v.latents"].dtype == dtype
    error, accepted = ((x.float() - exact).abs().mean() for x in (ours, stock))
    assert error < 2 * accepted


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_quantised_latents_agree_with_what_they_decode_to(bits, rope):
    model, ids = tiny_model(), prompt(2, N)
    cache = filled(shared(32, bits=bits, rope=rope), ids[:, :-1])
    decoded = DynamicCache()
    for i, store in enumerate(stores(cache)):
        decoded.update(*(rows.clone() for rows in store.logical_rows()), i)
    ours = model(ids[:, -1:], **cache_argument(cache)).logits
    assert_close("logits", ours, model(ids[:, -1:], **cache_argument(decoded)).logits, 1e-4)


@pytest.mark.parametrize("is_mixed, tolerance", [(True, 1e-4), (False, 1e-2)])
def test_bfloat16_directions_are_inverted_as_they_are(is_mixed, tolerance):
    """Projecting what was rebuilt changes nothing, although the directions are rounded."""
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    moments = Moments(1, 64)
    moments.add(rows.unsqueeze(0))
    # layers of different shapes
    parts = fit_jointly(moments, [(2, 16), (4, 8)], 40, is_mixed=is_mixed, dtype=torch.bfloat16)

    def project(rows):
        latents = sum(part.encode(x[None, None]) for part, x in zip(parts, rows.split(32, 1), strict=True))
        return torch.cat([part.decode(latents)[0].transpose(0, 1).flatten(1) for part in parts], 1)

    once = project(rows)
    assert_close("rows", project(once), once, tolerance)


def test_padding_and_broken_tokens_have_no_say_in_the_directions():
    ids, mask, rows = padded([90, 90])
    ids = torch.cat([torch.zeros(2, 60, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros_like(mask[:, :60]), mask], 1)
    with_pads, without = shared(16, n_sink=0), shared(16, n_sink=0)
    replay(tiny_model(), with_pads, ids, [150], mask)
    replay(tiny_model(), without, torch.cat(rows), [90])
    for side in "kv":
        ours, theirs = (
            torch.cat([store.lowrank(side).basis.up_by_head for store in stores(cache)]).transpose(1, 2).flatten(0, 1)
            for cache in (with_pads, without)
        )
        assert_close(side, ours @ ours.T, theirs @ theirs.T, 1e-3)  # directions may change sign

    broken = torch.randn(300, 64)
    broken[7, 3] = torch.nan
    codec = kv.LowRank(16, rope="post", share_layers=2).for_shape(2, 16)
    pair = [SharedStore(codec, codec, window=8) for _ in "ab"]
    for store, x in zip(pair, broken.split(32, 1), strict=True):
        x = x.unflatten(1, (2, 16)).transpose(0, 1).unsqueeze(0)
        store.append(x, x)
        store.join(pair[0], 2)
        store.pack()
    assert pair[0].keys.basis.up.isfinite().all() and pair[1].packed["k.latents"].isnan().any(-1).sum() == 1


# -- which layers share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_layers, options, expected",
    [
        (4, {}, [[0, 1], [2, 3]]),
        (5, {}, [[0, 1], [2, 3], [4]]),
        (5, {"share_layers": 4}, [[0, 1, 2, 3], [4]]),
        (2, {"share_layers": 4}, [[0, 1]]),
    ],
)
@pytest.mark.parametrize("knows_config", [False, True])
def test_groups(n_layers, options, expected, knows_config):
    model = deep_llama(n_layers)
    # more channels than the layer that is left over has
    cache = filled(shared(40, config=model.config if knows_config else None, **options), model=model)
    assert groups(cache) == expected
    for group in expected:
        rank = min(40, 32 * len(group))
        assert all(stores(cache)[i].packed["v.latents"].shape[1::2] == (1, rank) for i in group)


def test_edge_layers_stay_out():
    model = deep_llama(6)
    cache = filled(shared(1.0, edge_layers=1), model=model)
    assert [layer.store.n_packed > 0 for layer in cache.layers] == [False] + [True] * 4 + [False]
    assert persist.groups_of(cache) == [[1, 2], [3, 4]]


def test_sliding_layers_stay_out():
    assert groups(filled(shared(), model=tiny_model("gemma3"))) == [[1, 3]]


def test_outside_a_model_rows_stay_dense():
    cache = shared()
    for _ in range(9):
        for i in range(2):
            cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), i)
    assert all(store.n_packed == 0 and store.n_kept == 180 for store in stores(cache))


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_formula_and_counted_once():
    cache = filled(shared((32, 16)))
    leader, member = stores(cache)
    n = leader.n_packed
    # float32 latents of both sides and a position
    assert leader.packed.nbytes == 2 * n * ((32 + 16) * 4 + 4)
    basis = sum(WIDTH * r + r + WIDTH for r in (32, 16)) * 4
    dense = sum(store.dense.nbytes for store in (leader, member))
    ours = leader.nbytes + member.nbytes
    assert ours == leader.packed.nbytes + basis + dense
    assert sum(row["nbytes"] for row in cache.report()) == ours
    assert leader.keys.nbytes_per_token(16, 4) == 32 * 4 / 4
    # the storages that exist, found the long way
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state(cache).values()}
    for store in (leader, member):
        for codec in (store.keys, store.values):
            constants = codec.fitted_part.constants().values()
            found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in constants}
    assert sum(found.values()) == ours


def test_the_packed_bytes_are_those_of_layers_apart_at_the_same_share():
    together, apart = filled(shared(0.5)), filled(kv.LowRankCache(0.5, group_size="all", window=8, n_sink=2))
    latents = [sum(t.nbytes for at, t in state(cache).items() if "latents" in at[2]) for cache in (together, apart)]
    positions = [
        sum(t.nbytes for at, t in state(cache).items() if at[1:] == ("packed", "position_ids"))
        for cache in (together, apart)
    ]
    assert latents[0] == latents[1] and 2 * positions[0] == positions[1] > 0


def test_longer_texts_compress_more():
    ratios = [filled(shared(16), prompt(1, n)).compression_ratio for n in (100, 300, 1000)]
    assert ratios == sorted(ratios) and ratios[0] > 1 and ratios[2] > 3


def test_nothing_is_packed_that_would_not_pay():
    # a row for every channel; at 3/4 of the rank latents and basis, 3 N / 4 + 3 W / 4 < N, would take three
    for rank, least in ((16, 64), (40, 106), (48, 128), (64, 128)):
        for n, packed in ((least - 1, 0), (least, least // 32 * 32)):
            cache = filled(shared(rank, window=0, n_sink=0), prompt(1, n))
            assert [store.n_packed for store in stores(cache)] == [packed, packed]


# -- what generate does with a cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 37}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_generation_at_full_rank(arch, options):
    model = tiny_model(arch)
    # a repeated text gives the look-up something to find
    ids = prompt(1, N // 2).repeat(1, 2)
    options = options | {"max_new_tokens": 60, "output_logits": False}
    cache = shared(1.0)
    ours = generate(model, ids, cache, **options)
    assert torch.equal(ours.sequences, generate(model, ids, DynamicCache(config=model.config), **options).sequences)
    assert cache.layers[-1].store.n_packed >= 224


def test_reordering_moves_shared_rows_once():
    cache = filled(shared(), prompt(3, N))
    before = {where: t.clone() for where, t in state(cache).items()}
    assert {where for where in before if where[1] == "packed"} == {
        (0, "packed", f) for f in ("k.latents", "v.latents", "position_ids")
    }
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    for where, t in state(cache).items():
        assert torch.equal(t, before[where][order])


def test_batch_select_and_repeat():
    cache, tail = filled(shared(), prompt(3, N)), prompt(3, 50, seed=7)
    whole = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    ours, theirs = (replay(tiny_model(), c, x, [9] + [1] * 41) for c, x in ((cache, tail[rows]), (whole, tail)))
    assert_close("logits", ours, theirs[rows], 1e-4)
    assert cache.layers[0].store.n_packed >= 224


@pytest.mark.parametrize("n", [1, 9, 40, 150, N])
def test_crop(n):
    cache = filled(shared())
    before = [[rows.clone() for rows in store.logical_rows()] for store in stores(cache)]
    cache.crop(-n)
    assert cache.get_seq_length() == N - n
    if n == N:
        assert all(store.nbytes == 0 and store.keys.is_unfitted for store in stores(cache))
        return
    for store, rows in zip(stores(cache), before, strict=True):
        assert store.n_kept == N - n
        for ours, theirs in zip(store.logical_rows(), rows, strict=True):
            assert_close("rows", ours, theirs[:, :, : N - n], 1e-5)
    replay(tiny_model(), cache, prompt(2, 60, seed=6), [20] + [1] * 40)
    assert all(store.dense.n_tokens < 8 + 2 + store.step for store in stores(cache))


def test_copies_are_apart():
    ids, tail = prompt(2, N), prompt(2, 60, seed=5)
    cache = filled(shared(), ids)
    twin = copy.deepcopy(cache)
    assert groups(twin) == [[0, 1]]
    ours, theirs = stores(cache), stores(twin)
    assert theirs[1].packed is theirs[0].packed is not ours[0].packed
    first = replay(tiny_model(), twin, tail, [1] * 60)
    assert ours[0].n_packed == ours[1].n_packed < theirs[1].n_packed
    assert torch.equal(replay(tiny_model(), cache, tail, [1] * 60), first)
    assert_same_state(cache, twin)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("options", [{}, {"bits": 4, "rope": "post"}], ids=["pre", "post-quant4"])
def test_saved_and_loaded(arch, options, tmp_path):
    model, tail = tiny_model(arch), prompt(2, 60, seed=5)
    cache = filled(shared(**options), model=model)
    cache.save(tmp_path / "one")
    loaded = kv.KVCache.load(tmp_path / "one", model=model)
    assert groups(loaded) == groups(cache)
    assert stores(loaded)[1].packed is stores(loaded)[0].packed
    assert loaded.nbytes <= cache.nbytes
    leader, member = stores(loaded)
    assert leader.lowrank("k").basis.down is member.lowrank("k").basis.down and "down" not in member.constants("keys")
    # a loaded cache can be saved, and cropped
    loaded.save(tmp_path / "two")
    again = kv.KVCache.load(tmp_path / "two", model=model)
    expected = replay(model, cache, tail, [1] * 60)
    assert torch.equal(replay(model, loaded, tail, [1] * 60), expected)
    if arch != "gemma3":
        # sliding layers would have to be told beforehand
        replay(model, again, tail[:, :1], [1])
        again.crop(-61)
        assert all(store.n_kept == N - 60 for store in stores(again))


def test_saved_before_anything_is_packed_and_while_a_crop_is_due(tmp_path):
    model, ids = tiny_model(), prompt(1, 260)
    cache = filled(shared(1.0), ids[:, :60])
    cache.activate_past_recording()
    model(ids[:, 60:N], **cache_argument(cache))
    assert stores(cache)[0].n_packed == 0
    cache.save(tmp_path)
    # saving changes nothing: what is due comes with the next tokens
    assert stores(cache)[0].n_packed == 0
    loaded = kv.KVCache.load(tmp_path, model=model)
    expected = replay(model, DynamicCache(), ids, [260])[:, N:]
    assert_close("logits", replay(model, loaded, ids[:, N:], [1] * 60), expected, 1e-4)
    assert stores(loaded)[0].n_packed > 0
    filled(shared(1.0), ids[:, :60]).save(tmp_path)
    loaded = kv.KVCache.load(tmp_path, model=model)
    assert_close("logits", replay(model, loaded, ids[:, 60:], [140] + [1] * 60)[:, -60:], expected, 1e-4)


def test_reset_frees_and_starts_again():
    cache = filled(shared())
    bases = [store.keys.basis for store in stores(cache)]
    cache.reset()
    assert cache.nbytes == 0 and all(store.keys.is_unfitted for store in stores(cache))
    other, fresh = prompt(1, N, seed=4), shared()
    assert torch.equal(*(replay(tiny_model(), c, other, [150] + [1] * 50) for c in (cache, fresh)))
    assert_same_state(cache, fresh)
    assert cache.nbytes == fresh.nbytes
    assert all(store.keys.basis is not basis for store, basis in zip(stores(cache), bases, strict=True))


# -- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: shared(policy=kv.KeyDiff(budget=400)), "KeyDiff drops tokens"),
        (lambda: shared(offloading=True), "share_layers=2 .* offloading"),
        (lambda: shared(exact_prefill=False), "share_layers=2 .* exact_prefill=False"),
        (lambda: shared(bases=object()), "share_layers=2 is fitted to the prompt"),
        (lambda: shared(share_layers=0), "not a number of layers"),
        (lambda: shared(share_layers=2.0), "not a number of layers"),
        (lambda: kv.KVCache(codec=(kv.LowRank(share_layers=2), kv.LowRank())), "the same share_layers"),
        (lambda: kv.KVCache(codec=(kv.LowRank(share_layers=2), kv.Quantize(4))), "the same share_layers"),
        (lambda: kv.QuantCache(edge_layers=1, edge_codec=kv.LowRank(share_layers=2)), "edge_codec"),
    ],
)
def test_arguments_that_cannot_work(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    "options, message",
    [({"group_size": 1}, "share those of all heads"), ({"rank": 65}, "more than the 64 channels")],
)
def test_settings_that_do_not_fit_the_model(options, message):
    with pytest.raises(ValueError, match=message):
        filled(shared(**options))


def test_layers_on_two_devices_share_nothing():
    model, cache = new_model(LlamaConfig(**SIZES)), shared()

    def elsewhere(*_):
        cache.layers[0].device = torch.device("meta")

    model.model.layers[1].self_attn.register_forward_pre_hook(elsewhere)
    with pytest.raises(ValueError, match="layers 0 to 1 share rows, and lie on cpu and meta"):
        filled(cache, model=model)
