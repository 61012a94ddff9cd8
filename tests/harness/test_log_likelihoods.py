"""Log-likelihoods: those of the harness where nothing is lost, and else what `generate` sees behind the cache."""

import pytest
import torch
from harness_toys import PROSE, behind, likelihoods, requests, rolling, stock
from rooms import telling

from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.reading import finish
from hf_kvcache.eval.specs import parse
from hf_kvcache.lm_eval import scoring
from hf_kvcache.long_prompts import prefill

# several continuations of one context, of different lengths, some of a single token; no context; a space at its end
PAIRS = (
    *((PROSE[:700], said) for said in (" yes", " no", " the rain fell on the roof", " the rain fell", " a")),
    *((PROSE[700:1100], said) for said in (" yes", " the harbour and the boats")),
    ("", "The rain fell"),
    (PROSE[:60] + " ", "boats"),
)
TEXTS = (PROSE[:300], PROSE[1000:1040], PROSE[2000:2130])
LOSSLESS = ("dynamic", "dense", "streaming:budget=4096", "snapkv:ratio=1.0")
LOSSY = ("quant:bits=2,window=0", "quant:bits=4,window=8", "snapkv:ratio=0.25", "h2o:ratio=0.25,interval=1")


@pytest.fixture(scope="module")
def expected():
    return likelihoods(stock(), *PAIRS)


def same(found, expected):
    values = torch.tensor([[a, b] for (a, _), (b, _) in zip(found, expected, strict=True)])
    torch.testing.assert_close(values[:, 0], values[:, 1], rtol=1e-5, atol=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def after(model, cache, token):
    """Log-probabilities `[vocab]` once a token has been fed."""
    return feed(model, cache, torch.tensor([[token]]))[0].log_softmax(-1)


@pytest.mark.parametrize("cache", LOSSLESS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_loses_nothing_scores_as_the_harness_does(cache, batch_size, expected):
    same(likelihoods(behind(cache, batch_size=batch_size), *PAIRS), expected)


@pytest.mark.parametrize("cache", LOSSY)
def test_what_loses_something_scores_otherwise(cache, expected):
    found = likelihoods(behind(cache, batch_size=4), *PAIRS)
    # those of a single token, too
    lost = [abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)]
    assert min(lost[:7]) > 1e-4 and max(lost[:7]) > 0.02


@pytest.mark.parametrize(
    "cache", telling([*LOSSY, "kvzip:ratio=0.5", "adakv:ratio=0.5", "lowrank:rank=0.5"], LOSSY[1], LOSSY[2])
)
@pytest.mark.filterwarnings("ignore:.*carries no low-rank bases")
def test_scores_are_those_that_generate_would_see(cache):
    """A prompt is prefilled but for its last token, which `generate` feeds; the next ones follow one at a time."""
    lm = behind(cache, batch_size=4)
    pairs = *PAIRS[:7], ("It rained", " on the roof")
    for (context, said), (score, is_greedy) in zip(pairs, likelihoods(lm, *pairs), strict=True):
        ids, more = lm._encode_pair(context, said)
        filled = parse(cache).build(lm.model.config)
        prefill(lm.model, torch.tensor([ids]), filled, chunk=len(ids))
        finish(filled)
        total, chosen = 0.0, []
        for token, following in zip([ids[-1], *more], more, strict=False):
            log_probs = after(lm.model, filled, token)
            total += float(log_probs[following])
            chosen.append(int(log_probs.argmax()))
        assert score == pytest.approx(total, abs=1e-4) and is_greedy == (chosen == more)


def test_greedy_is_what_generate_says():
    lm = behind("quant:bits=2,window=0")
    context = PROSE[:500]
    ids, cache = torch.tensor([lm.tok_encode(context)]), lm._new_cache()
    prefill(lm.model, ids, cache, chunk=ids.shape[1])
    said = lm.model.generate(ids, **cache_argument(cache), max_new_tokens=6, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    others = [*said[:-1], said[-1] + 1]
    found = lm._loglikelihood_tokens([(("", ""), ids[0].tolist(), more) for more in (said, others)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_a_context_is_read_once(monkeypatch):
    lm, read = behind("quant:bits=4", batch_size=2), []
    forward = scoring.Scorer._forward

    def counted(self, ids, cache, n):
        read.append(tuple(ids.shape))
        return forward(self, ids, cache, n)

    monkeypatch.setattr(scoring.Scorer, "_forward", counted)
    likelihoods(lm, *PAIRS[:5])
    prompts = [shape for shape in read if shape[1] > 1]
    assert len(prompts) == 1 and prompts[0][0] == 1
    # " yes", " no" and " a" are one row, and the two long ones, which are fed first, two more
    assert read[1][0] == 2 and read[-1] == (1, 1)


def test_what_cannot_be_copied_is_read_once_more(monkeypatch):
    """As quantised tensors of optimum-quanto."""
    lm = behind("quant:bits=4,window=8", batch_size=1)
    before = likelihoods(lm, *PAIRS)
    monkeypatch.setattr(scoring.copy, "deepcopy", lambda cache: (_ for _ in ()).throw(RuntimeError("no copy")))
    same(likelihoods(lm, *PAIRS), before)


def test_contexts_that_are_too_long_lose_their_beginning():
    pairs = [(PROSE[:900], " the rain fell"), (PROSE[:900], " a")]
    short = {"max_length": 64, "batch_size": 2}
    same(likelihoods(behind("dense", **short), *pairs), likelihoods(stock(max_length=64), *pairs))
    with pytest.raises(ValueError, match="reads at most 8"):
        likelihoods(behind("dense", max_length=8), ("a", PROSE[:300]))


def test_a_prefix_of_ones_own_stands_before_texts_without_context():
    pairs = [("", "The rain fell")]
    found = likelihoods(behind("dense", prefix_token_id=7), *pairs)
    same(found, likelihoods(stock(prefix_token_id=7), *pairs))
    assert found[0][0] != pytest.approx(likelihoods(behind("dense"), *pairs)[0][0], abs=1e-3)


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "dense"])
def test_texts_are_scored_as_the_harness_does(cache):
    short = {"max_length": 50}
    found = rolling(behind(cache, **short, batch_size=2), *TEXTS)
    assert found == pytest.approx(rolling(stock(**short), *TEXTS), rel=1e-5)


@pytest.mark.parametrize("cache", telling(["quant:bits=2,window=0", "snapkv:ratio=0.25"], "snapkv:ratio=0.25"))
def test_the_second_half_of_a_window_is_scored_through_the_cache(cache):
    exact, found = (rolling(behind(name), PROSE[:400])[0] for name in ("dense", cache))
    assert abs(found - exact) > 0.1
    # the sum of what was read and of what was fed
    lm = behind(cache)
    window = [lm.prefix_token_id, *lm.tok_encode(PROSE[:400])]
    n_read = (len(window) - 1) // 2
    filled = parse(cache).build(lm.model.config)
    with torch.no_grad():
        ids = torch.tensor([window])
        log_probs = lm.model(ids[:, :n_read], **cache_argument(filled), use_cache=True).logits[0].log_softmax(-1)
    total = float(log_probs.gather(1, ids[0, 1 : n_read + 1, None]).sum())
    finish(filled)
    for token, following in zip(window[n_read:], window[n_read + 1 :], strict=False):
        total += float(after(lm.model, filled, token)[following])
    assert found == pytest.approx(total, abs=1e-2)


def test_a_cache_that_reads_twice_has_no_perplexity():
    with pytest.raises(ValueError, match="KVzip reads a text twice.*another cache"):
        rolling(behind("kvzip:ratio=0.5"), TEXTS[0])


def test_answers_reach_the_harness_own_cache():
    lm, kept = behind("dense"), {}
    lm.cache_hook.dbdict = kept
    likelihoods(lm, *PAIRS[:2])
    rolling(lm, TEXTS[1])
    lm.generate_until(requests("generate_until", ("The rain", {"until": ["."], "max_gen_toks": 2})), disable_tqdm=True)
    assert len(kept) == 4
