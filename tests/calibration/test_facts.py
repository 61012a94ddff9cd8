import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hf_kvcache as kv
from hf_kvcache.calibration.facts import KINDS, Facts
from hf_kvcache.calibration.text import mixed_batches, token_batches
from hf_kvcache.eval.tasks import vocabulary
from hf_kvcache.models import embedded_prose

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def facts():
    tokenizer = AutoTokenizer.from_pretrained(kv.embedded_model())
    tokenizer.chat_template = TEMPLATE
    text = embedded_prose().read_text(encoding="utf-8")[:60_000]
    return Facts(tokenizer, np.array(tokenizer(text, add_special_tokens=False)["input_ids"]))


def draw(facts, i, **options):
    options = dict(n_tokens=500, n_answer=200, n_query=0) | options
    return facts.prompt(rng=np.random.default_rng(i), **options)


def test_every_fact_is_in_the_text_and_asked_for(facts):
    numbers = set()
    for i in range(20):
        p = draw(facts, i)
        context, answer = facts.tokenizer.decode(p.ids), facts.tokenizer.decode(p.answer)
        assert len(p.ids) == 500 and context.startswith("<user>")
        said = [part.split("<user>")[0].split()[-1].strip('"') for part in answer.split("<assistant>")[1:]]
        assert said and all(value in context for value in said[:-1]), "the last answer may be cut"
        numbers.add(len(said))
    assert len(numbers) > 2, "some texts have one fact, some have many"


def test_what_is_drawn_depends_on_the_seed_alone(facts):
    assert torch.equal(draw(facts, 3).ids, draw(facts, 3).ids)
    assert not torch.equal(draw(facts, 3).ids, draw(facts, 4).ids)


def test_nothing_is_shared_with_the_tasks_of_evaluation(facts):
    assert not set(facts.words) & {*vocabulary.ADJECTIVES, *vocabulary.NOUNS}
    assert not any("secret" in f"{kind.fact} {kind.question}" for kind in KINDS)


def test_one_question(facts):
    p = draw(facts, 5, n_query=64)
    assert torch.equal(p.answer[: len(p.query)], p.query)
    assert facts.tokenizer.decode(p.answer).count("<assistant>") == 1


def test_sequences_mark_answers(facts):
    for i in range(10):
        s = facts.sequence(401, np.random.default_rng(i))
        assert len(s.ids) == len(s.is_answer) == 401 and s.is_answer.any() and not s.is_answer[:200].any()
        answers = facts.tokenizer.decode(s.ids[s.is_answer]).split()
        assert all(value in facts.tokenizer.decode(s.ids[:-1]) for value in answers)


def test_too_short(facts):
    with pytest.raises(ValueError, match="do not hold"):
        draw(facts, 0, n_tokens=16)
    with pytest.raises(ValueError, match="different words"):
        Facts(facts.tokenizer, facts.stream[:50])


def test_samples_of_prose_and_of_facts(facts):
    ids = torch.from_numpy(facts.stream).long()
    found = mixed_batches(facts.tokenizer, ids, 200, 10, prose_share=0.4)
    assert [tuple(one.shape) for one in found] == [(1, 200)] * 10
    prose = {tuple(one[0].tolist()) for one in token_batches(ids, 200, 4)}
    is_prose = [tuple(one[0].tolist()) in prose for one in found]
    assert sum(is_prose) == 4 and is_prose != sorted(is_prose) != is_prose[::-1]
    again = mixed_batches(facts.tokenizer, ids, 200, 10, prose_share=0.4)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(found, mixed_batches(facts.tokenizer, ids, 200, 10, 0.4, 1)))
    assert len(mixed_batches(facts.tokenizer, ids, 200, 3, prose_share=1.0)) == 3
    assert len(mixed_batches(facts.tokenizer, ids, 200, 3, prose_share=0.0)) == 3
    # a short text is not drowned in facts: three samples of prose fit, not ten
    assert len(mixed_batches(facts.tokenizer, ids[:650], 200, 20, prose_share=0.5)) == 6
