"""A text that was read once and handed on, against one that every cache reads for itself."""

from dataclasses import replace

import pytest
import torch
from cases import BY_ID, CASES, new_model, prompt, tiny_model
from toy_tasks import small_model
from transformers import DeepseekV3Config, DynamicCache

import hf_kvcache as kv
from hf_kvcache.adapters.modules import attached_heads
from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.reading import Reading, finish
from hf_kvcache.eval.replay import NotReplayed, check_replay, record, replay
from hf_kvcache.eval.running import Settings
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.texts import Texts
from hf_kvcache.policies import KVzip

TEXT, NEXT = prompt(length=80), prompt(length=9, seed=2)
LLAMA = ["llama", "qwen2", "qwen3", "phi3", "gemma"]


def kept(cache):
    """What is in a cache, name by name."""
    found = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, kv.KVLayer):
            found |= {(i, "k"): layer.keys, (i, "v"): layer.values}
            continue
        found[i, "seen"] = torch.tensor([layer.tokens_seen, layer.store.n_kept, layer.evicted_at or 0])
        for name, buffer in layer.store.buffers().items():
            found |= {(i, name, part): rows for part, rows in buffer.views().items()}
    return found


def assert_same(model, ours, theirs):
    """The same rows, bytes, and logits of what follows: several tokens at once, then one by one."""
    assert cache_nbytes(ours) == cache_nbytes(theirs)
    ours_kept, theirs_kept = kept(ours), kept(theirs)
    assert ours_kept.keys() == theirs_kept.keys() and len(ours_kept) > 3
    for name, rows in ours_kept.items():
        assert torch.equal(rows, theirs_kept[name]), name
    for ids in (NEXT, *NEXT.split(1, 1)):
        assert torch.equal(feed(model, ours, ids), feed(model, theirs, ids))
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.fixture(scope="module")
def heard():
    """One prefill for all caches of the table, whatever they do with its rows."""
    return record(tiny_model(), Texts(TEXT))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_is_a_prefill(case, heard):
    model, ours, theirs = tiny_model(), case.make(), case.make()
    check_replay(ours)
    replay(heard, ours)
    logits = feed(model, theirs, TEXT)
    assert torch.equal(heard.logits, logits)
    assert_same(model, ours, theirs)


def test_a_recording_is_never_changed(heard):
    """Caches that evict in place, and decode, leave it as it was."""
    before = [(h.k.clone(), h.v.clone(), h.query.clone()) for h in heard.layers]
    for name in ("snapkv-budget24", "h2o-budget24", "quant4-window8", "adakv-budget42", "keydiff-merge"):
        cache = BY_ID[name].make()
        replay(heard, cache)
        for token in TEXT.split(1, 1):
            feed(tiny_model(), cache, token)
    for h, rows in zip(heard.layers, before, strict=True):
        assert all(map(torch.equal, (h.k, h.v, h.query), rows))


@pytest.mark.parametrize("arch", LLAMA)
@pytest.mark.parametrize("name", ["snapkv-budget24", "lowrank0.5-window8"])
def test_models_replay(arch, name):
    model, ours, theirs = tiny_model(arch), BY_ID[name].make(), BY_ID[name].make()
    replay(record(model, Texts(TEXT)), ours)
    feed(model, theirs, TEXT)
    assert_same(model, ours, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_replay(implementation):
    model, make = tiny_model("llama", implementation), BY_ID["h2o-budget24"].make
    ours, theirs = make(), make()
    replay(record(model, Texts(TEXT)), ours)
    feed(model, theirs, TEXT)
    assert kept(ours).keys() == kept(theirs).keys()
    assert all(torch.equal(rows, kept(theirs)[name]) for name, rows in kept(ours).items())


# -- which caches are filled how -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    model, tokenizer = small_model()
    from hf_kvcache.adapters import attach
    from hf_kvcache.models import embedded_heads

    attach(model, str(embedded_heads()))
    text = "The rain fell on the harbour and the boats lay still, and nobody came to the door. " * 20
    return model, torch.tensor([tokenizer(text)["input_ids"]])


def filled(model, ids, text, **settings):
    """What `Reading` makes of a specification, with its own decision how."""
    reading = Reading(model, Texts(ids), Settings(**settings))
    return reading.fill(parse(text))


@pytest.mark.parametrize(
    "text, how",
    [
        ("dynamic", "replayed"),
        ("dense", "replayed"),
        ("quant:bits=4", "replayed"),
        ("sparse:sparsity=0.7,bits=4", "replayed"),
        ("lowrank:rank=0.5,bits=4", "replayed"),
        ("snapkv:ratio=0.25", "replayed"),
        ("h2o:ratio=0.25", "replayed"),
        ("chunkkv:ratio=0.25", "replayed"),
        ("expected_attention:ratio=0.25", "replayed"),
        ("adakv:ratio=0.25", "replayed"),
        ("keydiff:ratio=0.25+sparse:sparsity=0.5,bits=8", "replayed"),
        ("lowrank:rank=0.5,exact_prefill=false", "direct: exact_prefill=False"),
        ("locret:ratio=0.25", "replayed"),
        ("chunkkv:ratio=0.25,scorer=locret", "replayed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fitted to the prompt")
def test_every_cache_is_what_it_is_alone(small, text, how):
    model, ids = small
    ours, logits, said = filled(model, ids, text)
    theirs, expected, direct = filled(model, ids, text, replays=False)
    assert (said, direct) == (how, "direct")
    if text == "dynamic":
        # the model's own cache runs on sdpa
        assert torch.allclose(logits, expected, atol=1e-4)
        return
    assert torch.equal(logits, expected)
    assert_same(model, ours, theirs)


def test_the_context_is_read_once_for_all_caches(small, monkeypatch):
    model, ids = small
    read = []
    monkeypatch.setattr("hf_kvcache.eval.replay.feed", lambda *args: read.append("once") or feed(*args))
    monkeypatch.setattr("hf_kvcache.eval.reading.feed", lambda *args: read.append("again") or feed(*args))
    reading = Reading(model, Texts(ids), Settings())
    for text in ("dynamic", "quant:bits=4", "locret:ratio=0.5", "lowrank:exact_prefill=false", "snapkv:ratio=0.5"):
        cache = reading.fill(parse(text))[0]
        assert cache.get_seq_length() == ids.shape[1]
    assert read == ["once", "again"]


def test_what_waits_is_compressed_before_its_bytes_are_counted(small):
    """Locret evicts a prompt only once it knows that it is complete, which here it is."""
    model, ids = small
    cache = filled(model, ids, "locret:ratio=0.25")[0]
    waiting = parse("locret:ratio=0.25").build(model.config)
    feed(model, waiting, ids)
    assert cache_nbytes(cache) < 0.5 * cache_nbytes(waiting)
    finish(waiting)
    assert cache_nbytes(cache) == cache_nbytes(waiting)


@pytest.mark.filterwarnings("ignore:.*none of this model's layers is compressed")
@pytest.mark.parametrize("arch", ["gemma3", "mistral-window8"])
def test_models_with_a_window_read_for_every_cache(arch):
    model = tiny_model(arch)
    reading = Reading(model, Texts(TEXT), Settings())
    for text in ("dynamic", "quant:bits=4,window=8"):
        ours, _, how = reading.fill(parse(text))
        assert how == "direct: not all layers of this model have full attention"
        theirs = parse(text).build(model.config)
        feed(model, theirs, TEXT)
        assert cache_nbytes(ours) == cache_nbytes(theirs)
        assert torch.equal(feed(model, ours, NEXT), feed(model, theirs, NEXT))


def test_models_that_expand_their_rows_read_for_every_cache():
    sizes = dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=32, intermediate_size=64, vocab_size=128)
    latent = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    model = new_model(DeepseekV3Config(**sizes, **latent, num_hidden_layers=2, first_k_dense_replace=2))
    ours, logits, how = filled(model, TEXT, "quant:bits=4,window=8")
    theirs, expected, _ = filled(model, TEXT, "quant:bits=4,window=8", replays=False)
    assert how.startswith("direct: this model cannot be recorded: ")
    assert torch.equal(logits, expected) and torch.equal(feed(model, ours, NEXT), feed(model, theirs, NEXT))


def test_a_cache_of_decisions_is_not_replayed():
    with pytest.raises(NotReplayed, match="goes by what happens within the forward pass"):
        check_replay(parse("dms").build())
    check_replay(DynamicCache())
    twice = parse("kvzip:ratio=0.5").build()
    with pytest.raises(NotReplayed, match="KVzip reads a text twice"):
        check_replay(twice)
    check_replay(twice, twice=True)


def test_a_model_with_heads_reads_twice(small):
    """What stands for the model while a text is repeated has no heads that run."""
    model, ids = small
    ours, logits, said = filled(model, ids, "kvzip:ratio=0.25")
    theirs, expected, _ = filled(model, ids, "kvzip:ratio=0.25", replays=False)
    assert attached_heads(model.model.layers[0].self_attn) is not None and said == "replayed"
    assert torch.allclose(logits, expected, atol=1e-4) and ours.nbytes == theirs.nbytes


def test_too_little_memory_for_a_recording_is_no_failure(small, monkeypatch):
    def record(*args):
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr("hf_kvcache.eval.reading.record", record)
    reading = Reading(small[0], Texts(small[1]), Settings())
    assert [reading.fill(parse(text))[2] for text in ("dynamic", "dense")] == [
        "direct: this model cannot be recorded: OutOfMemoryError: out of memory"
    ] * 2


# -- several texts ---------------------------------------------------------------------------------------------------

SEVERAL = Texts.of([TEXT[0, :71].tolist(), TEXT[0].tolist(), TEXT[0, 5:70].tolist()])


def test_padding_is_on_the_left():
    assert SEVERAL.n_padding.tolist() == [9, 0, 15] and SEVERAL.lengths == [71, 80, 65]
    assert SEVERAL.mask.sum(1).tolist() == SEVERAL.lengths and SEVERAL.mask[:, -65:].all()
    assert torch.equal(SEVERAL.ids[2, 15:], TEXT[0, 5:70])
    assert Texts.of([[1, 2], [3, 4]]).mask is None and Texts(TEXT).lengths == [80]


def test_texts_of_other_lengths_are_what_they_are_alone():
    together = record(tiny_model(), SEVERAL)
    for i, n in enumerate(SEVERAL.lengths):
        alone = record(tiny_model(), Texts(SEVERAL.ids[i : i + 1, -n:]))
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-5)
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            assert torch.allclose(ours.k[i, :, -n:], theirs.k[0], atol=1e-5)
            assert torch.allclose(ours.query[i, :, -n:], theirs.query[0], atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_replay_of_several_is_their_prefill(case):
    model, ours, theirs = tiny_model(), case.make(), case.make()
    replay(record(model, SEVERAL), ours)
    feed(model, theirs, SEVERAL.ids, SEVERAL.n_padding)
    ours_kept, theirs_kept = kept(ours), kept(theirs)
    assert ours_kept.keys() == theirs_kept.keys()
    assert all(torch.equal(rows, theirs_kept[name]) for name, rows in ours_kept.items())
    for ids in NEXT.expand(3, -1).split(4, 1):
        pair = [feed(model, cache, ids, SEVERAL.n_padding) for cache in (ours, theirs)]
        assert torch.equal(*pair)


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa"])
@pytest.mark.parametrize(
    "name", ["dynamic", "quant:bits=4,window=16", "snapkv:ratio=0.5", "adakv:ratio=0.5", "h2o:ratio=0.5"]
)
@pytest.mark.parametrize("texts", [Texts(TEXT), SEVERAL], ids=["one", "several"])
def test_what_follows_a_recording_need_not_be_read_with_it(texts, name, implementation, monkeypatch):
    """A context that is asked about twice is read once, for known questions, too."""
    read = []
    monkeypatch.setattr("hf_kvcache.eval.replay.feed", lambda *args: read.append(args[2].shape[1]) or feed(*args))
    model, asked = tiny_model("llama", implementation), NEXT.expand(len(texts.ids), -1)
    settings = Settings(attention=implementation)
    context = Reading(model, texts, settings)
    context.fill(parse("dense"))
    known = Reading(model, texts.followed_by(asked), settings, context)
    ours, logits, how = known.fill(parse(name))
    # a mask that is a tensor says nothing of the tokens before this call
    is_read_on = implementation == "hf_kvcache"
    assert how == "replayed" and read == ([80, 9] if is_read_on else [80, 9, 89])
    theirs, expected, _ = Reading(model, known.texts, replace(settings, replays=False)).fill(parse(name))
    assert torch.allclose(logits, expected, atol=1e-5) and cache_nbytes(ours) == cache_nbytes(theirs)
    following = [feed(model, cache, asked, texts.n_padding) for cache in (ours, theirs)]
    assert torch.allclose(*following, atol=1e-3)


# -- texts that are read twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [Texts(TEXT), SEVERAL], ids=["one", "several"])
def test_a_second_pass_is_replayed_too(texts, monkeypatch):
    """Its rows and queries are the same for all caches: of two passes each, the model makes two in all.

    What a repetition says of the rows of a layer is asked once, too.
    """
    model, read, largest, n_scored = tiny_model(), [], KVzip.largest_weights, []

    def count(module, args, kwargs):
        read.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr(KVzip, "largest_weights", lambda *args: n_scored.append(1) or largest(*args))
    reading = Reading(model, texts, Settings())
    names = (
        "kvzip:ratio=0.5",
        "kvzip:ratio=0.25,level=head",
        "kvzip:ratio=0.5+quant:bits=8,window=16",
        "kvzip:ratio=0.75",
    )
    filled = [reading.fill(parse(name)) for name in names]
    hook.remove()
    assert [n for n in read if n > 1] == [80, 79] and {how for *_, how in filled} == {"replayed"}
    assert len(n_scored) == model.config.num_hidden_layers
    for name, (ours, logits, _) in zip(names, filled, strict=True):
        theirs, expected, _ = Reading(model, texts, Settings(replays=False)).fill(parse(name))
        assert torch.allclose(logits, expected, atol=1e-4) and cache_nbytes(ours) == cache_nbytes(theirs)
        for ids in NEXT.expand(len(texts.ids), -1).split(4, 1):
            assert torch.allclose(*(feed(model, cache, ids, texts.n_padding) for cache in (ours, theirs)), atol=1e-3)


def test_chunks_of_a_second_pass_are_told_apart():
    model, texts = tiny_model(), Texts(TEXT)
    reading = Reading(model, texts, Settings())
    for name in ("kvzip:ratio=0.5,chunk=24", "kvzip:ratio=0.5,chunk=100"):
        ours, logits, how = reading.fill(parse(name))
        _, expected, _ = Reading(model, texts, Settings(replays=False)).fill(parse(name))
        assert how == "replayed" and torch.allclose(logits, expected, atol=1e-4)
