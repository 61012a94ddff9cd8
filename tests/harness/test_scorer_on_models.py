"""Passages of models with layers of both kinds: those that slide, which are transformers' own, and ours."""

import pytest
import torch
from cases import prompt, tiny_model

from hf_kvcache.eval.specs import parse
from hf_kvcache.lm_eval.passages import answer, text
from hf_kvcache.lm_eval.scoring import Scorer

IDS = prompt(1, 80)[0].tolist()
# of one context, of different lengths; the last one shares its first tokens with the first
CONTINUATIONS = IDS[60:72], IDS[40:45], [7], [*IDS[60:71], 9]


@pytest.mark.parametrize("cache", ["dynamic", "dense"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "mistral-window8"])
def test_a_passage_has_the_likelihood_of_one_pass(arch, cache):
    model, spec = tiny_model(arch), parse(cache)
    passages = [answer(IDS[:60], said, 100) for said in CONTINUATIONS] + [text(IDS[:1], IDS[1:50], 100)]
    scorer = Scorer(model, lambda: spec.build(model.config), 3, lambda logits: logits.log_softmax(-1))
    found = {i: total for i, total, _ in scorer.score(passages)}
    for i, passage in enumerate(passages):
        ids = torch.tensor([[*passage.read, *passage.fed, passage.last]])
        log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        each = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        assert found[i] == pytest.approx(float(each[passage.n_given - 1 :].sum()), abs=2e-3)
