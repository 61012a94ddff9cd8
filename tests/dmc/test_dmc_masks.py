"""What masks say of tokens that have been merged or dropped is heard: as it was before, or an error; calls that fail
leave nothing behind.
"""

import copy
from contextlib import suppress

import pytest
import torch
from cases import prompt, state
from rooms import telling
from tiny_retrofits import CACHES, batch, feed, lengths, retrofitted, whole

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

METHODS = ["dmc", "dms"]
IMPLEMENTATIONS = ["hf_kvcache", "sdpa", "eager"]


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


def model_of(method, implementation="hf_kvcache", **knobs):
    model = retrofitted(method, n_layers=2, bias=[0.3, 0.1], **dict(window=4) | knobs)
    model.set_attn_implementation(implementation)
    return model


def prompted(model, method, sizes, n):
    """A cache of the first `n` tokens of left-padded texts, and what was fed."""
    inputs, cache = batch(sizes), CACHES[method]()
    with torch.no_grad():
        feed(model, cache, *(t[:, :n] for t in inputs), [n - 1, 1])
    return cache, inputs


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))


def of_queries(two, n_new):
    """A mask of one's own, `[B, 1, S, T]`, that says the same."""
    T = two.shape[1]
    return (torch.ones(n_new, T, dtype=torch.bool).tril(T - n_new) & two.bool()[:, None, None]).clone()


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_new", [1, 3], ids=["token", "chunk"])
@pytest.mark.parametrize("form", ["text", "queries", "additive"])
def test_the_mask_as_it_was(method, implementation, n_new, form):
    model = model_of(method, implementation)
    cache, (ids, mask, positions) = prompted(model, method, [20, 13], 16)
    new = slice(16, 16 + n_new)
    two = mask[:, : 16 + n_new]
    said = {"text": two, "queries": of_queries(two, n_new), "additive": additive(of_queries(two, n_new))}[form]
    out = model(ids[:, new], attention_mask=said, position_ids=positions[:, new], **cache_argument(cache)).logits
    wanted = whole(model, ids, mask, positions)[:, new]
    assert (out - wanted).abs().max() <= 1e-10


def hidden(two):
    two[0, 5:9] = 0


def shown(two):
    two[1, :] = 1


def longer(two):
    two[0, :4] = 0


def later(two):
    two[0, -1] = 0


CHANGES = {
    "hidden": (hidden, "hides tokens behind the first one"),
    "shown": (shown, "shows tokens that were padding"),
    "longer": (longer, "hides tokens that were real"),
    "later": (later, "hides tokens behind the first one"),
}


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n_new", [1, 3], ids=["token", "chunk"])
@pytest.mark.parametrize("form", ["text", "queries"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_mask_of_the_past_is_refused(method, implementation, n_new, form, change):
    model = model_of(method, implementation)
    cache, (ids, mask, positions) = prompted(model, method, [20, 13], 16)
    before, wanted = state(cache), copy.deepcopy(cache)
    by, message = CHANGES[change]
    new = slice(16, 16 + n_new)
    two = mask[:, : 16 + n_new].clone()
    by(two)
    said = two if form == "text" else of_queries(two, n_new)
    with pytest.raises(ValueError, match=f"layer 0: the attention mask {message}"):
        model(ids[:, new], attention_mask=said, position_ids=positions[:, new], **cache_argument(cache))
    # nothing has happened
    assert all(torch.equal(t, before[at]) for at, t in state(cache).items()) and cache.get_seq_length() == 16
    two = mask[:, : 16 + n_new]
    a, b = (
        model(ids[:, new], attention_mask=two, position_ids=positions[:, new], **cache_argument(c)).logits
        for c in (cache, wanted)
    )
    assert torch.equal(a, b)


@torch.no_grad()
def test_a_mask_of_new_tokens_alone_is_refused(method):
    model = model_of(method)
    cache, (ids, mask, positions) = prompted(model, method, [20, 20], 16)
    with pytest.raises(ValueError, match=r"mask \[2, 3\] must cover the 19 tokens"):
        model(ids[:, 16:19], attention_mask=mask[:, 16:19], **cache_argument(cache))


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_that_shows_later_tokens_is_refused(method, implementation):
    model = model_of(method, implementation)
    cache, (ids, _, _) = prompted(model, method, [20], 16)
    everything = torch.ones(1, 1, 3, 19, dtype=torch.bool)
    with pytest.raises(ValueError, match="is not causal"):
        model(ids[:, 16:19], attention_mask=everything, **cache_argument(cache))


@torch.no_grad()
def test_a_bias_is_refused(method):
    model = model_of(method, "eager")
    cache, (ids, _, _) = prompted(model, method, [20], 16)
    mask = additive(of_queries(torch.ones(1, 19), 3))
    mask[..., 3] -= 0.5
    with pytest.raises(ValueError, match="attention mask"):
        model(ids[:, 16:19], attention_mask=mask, **cache_argument(cache))


@torch.no_grad()
def test_a_bias_without_a_cache_is_refused(method):
    model, mask = model_of(method, "eager"), additive(of_queries(torch.ones(1, 9), 9))
    wanted = model(prompt(1, 9), use_cache=False).logits
    assert torch.equal(model(prompt(1, 9), attention_mask=mask, use_cache=False).logits, wanted)
    with pytest.raises(ValueError, match="a bias"):
        model(prompt(1, 9), attention_mask=torch.where(mask == 0, 0.5, mask), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["s_aux", "position_bias", "unheard_of"])
@pytest.mark.parametrize("has_cache", [False, True], ids=["whole", "cache"])
def test_arguments_of_attention_that_decisions_cannot_serve(method, name, has_cache):
    """Sinks of a model, say: refused, and before anything has changed."""
    model, cache = model_of(method), CACHES[method]()
    options = cache_argument(cache) if has_cache else dict(use_cache=False)
    with pytest.raises(ValueError, match=f"layer 0: .*{name} cannot express"):
        model(prompt(1, 1), **options, **{name: torch.zeros(4)})
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


@torch.no_grad()
def test_a_mask_says_something_else_after_it_was_written_to(method):
    model = model_of(method, "sdpa")
    cache, (ids, _, positions) = prompted(model, method, [20], 16)
    mask = of_queries(torch.ones(1, 17), 1)
    copies = copy.deepcopy(cache), copy.deepcopy(cache)
    options = dict(attention_mask=mask, position_ids=positions[:, 16:17])
    model(ids[:, 16:17], **options, **cache_argument(copies[0]))
    mask[..., 3] = False
    with pytest.raises(ValueError, match="hides tokens"):
        model(ids[:, 16:17], **options, **cache_argument(copies[1]))


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2], ids=["token", "chunk"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_call_in_which_every_row_is_padding(method, implementation, n, tmp_path):
    model = model_of(method, implementation)
    inputs, cache = batch([12, 9]), CACHES[method]()
    ids, mask, positions = (torch.cat([torch.zeros(2, 4, dtype=torch.long), t], 1) for t in inputs)
    is_real = mask.bool()
    logits = feed(model, cache, ids, mask, positions, [n, n] + [1] * (16 - 2 * n))
    assert (logits - whole(model, ids, mask, positions))[is_real].abs().max() <= 1e-10
    alike = CACHES[method]()
    # as far as that, it can be taken apart, and saved
    feed(model, alike, ids[:, :2], mask[:, :2], positions[:, :2], [n] * (2 // n))
    alike.save(tmp_path)
    alike = kv.KVCache.load(tmp_path, model)
    alike.batch_select_indices(torch.tensor([1, 0]))
    assert alike.get_seq_length() == 2 and not lengths(alike).any()
    # the same rows as without what was padding for all
    fresh = CACHES[method]()
    feed(model, fresh, *inputs, [1] * 12)
    assert torch.equal(lengths(cache), lengths(fresh))


# -- calls that fail -----------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("where", ["q_proj", "k_proj", "v_proj", "update", "attention"])
@pytest.mark.parametrize("n_new", [1, 3], ids=["token", "chunk"])
@pytest.mark.parametrize("window", telling([4, 0], 4))
@pytest.mark.parametrize("n_held", [16, 0], ids=["held", "empty"])
def test_a_call_that_fails_leaves_the_rows_and_the_running_mean(method, where, n_new, window, n_held, monkeypatch):
    model = model_of(method, window=window)
    cache = CACHES[method]()
    ids = prompt(1, 30)
    if n_held:
        model(ids[:, :n_held], **cache_argument(cache))
    wanted = copy.deepcopy(cache)

    def fail(*args, **kwargs):
        raise Failure

    attention = model.model.layers[0].self_attn
    with suppress(Failure), monkeypatch.context() as patch:
        if where == "update":
            patch.setattr(cache, "update", fail)
        elif where == "attention":
            # the sinks of a model come to light when its attention function is called
            patch.setattr("hf_kvcache.dmc.attention.refuse_unfused", fail)
        else:
            patch.setattr(getattr(attention, where), "forward", fail)
        model(prompt(1, n_new, seed=9), **cache_argument(cache))
        raise AssertionError("nothing failed")
    assert cache.get_seq_length() == n_held
    # another batch may begin where nothing has
    rest = slice(n_held, n_held + 3)
    ids = ids if n_held else ids.expand(2, -1)
    for piece in (rest, *(slice(t, t + 1) for t in range(rest.stop, rest.stop + 6))):
        assert torch.equal(
            *(model(ids[:, piece], **cache_argument(c)).logits for c in (cache, wanted)),
        )
    ours, theirs = state(cache), state(wanted)
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[at]) for at, t in ours.items())


def test_a_call_keeps_no_cache_alive(method):
    import gc
    import weakref

    model, cache = model_of(method), CACHES[method]()
    with torch.no_grad():
        model(prompt(1, 5), **cache_argument(cache))
    layer = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert layer() is None
