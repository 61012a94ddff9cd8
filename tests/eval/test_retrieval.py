import numpy as np
import pytest
import torch

from hf_kvcache.compat import given_cache
from hf_kvcache.eval.retrieval import (
    N_KEYS,
    N_VALUES,
    Ledger,
    LedgerPrompts,
    build_prompts,
    draw_n_entries,
    exact_match,
    ledger_tokens,
)
from hf_kvcache.models import embedded_model, embedded_prose

N_LEDGER = len(ledger_tokens())
N_PROSE_TOKENS = 50


@pytest.fixture
def ledger():
    ids = np.arange(N_LEDGER) + N_PROSE_TOKENS
    n_entries = N_KEYS * N_VALUES
    return Ledger(
        entries=ids[:n_entries].reshape(N_KEYS, N_VALUES),
        questions=ids[n_entries : n_entries + N_KEYS],
        answers=ids[n_entries + N_KEYS :],
        space=1,
        bos=0,
        starts_word=np.arange(N_PROSE_TOKENS + N_LEDGER) % 2 == 0,
    )


@pytest.fixture
def filler():
    return np.random.default_rng(1).integers(2, N_PROSE_TOKENS, size=700)


def read_back(ledger, row):
    """Entries of a context as `{question id: [(answer id, position), …]}`."""
    found = {}
    for position, token in enumerate(row.tolist()):
        for key, value in np.argwhere(ledger.entries == token):
            found.setdefault(ledger.questions[key], []).append((ledger.answers[value], position))
    return found


@pytest.mark.parametrize("n_tokens", [256, 1023, 2048])
@pytest.mark.parametrize("n_entries", [8, 64])
def test_context_has_exactly_the_tokens_asked_for(ledger, filler, n_tokens, n_entries):
    prompts = build_prompts(ledger, filler, n_tokens, n_prompts=3, n_questions=5, n_entries=n_entries)
    assert prompts.context.shape == (3, n_tokens)
    assert prompts.asks.shape == (3, 5, 2)
    assert prompts.with_answers().shape == (3, n_tokens + 15)
    assert (prompts.context[:, 0] == ledger.bos).all()


def test_each_answer_stands_once_at_its_depth(ledger, filler):
    prompts = build_prompts(ledger, filler, 1024, n_prompts=4)
    for b in range(4):
        entries = read_back(ledger, prompts.context[b])
        assert 8 <= len(entries) <= 64
        assert all(len(places) == 1 for places in entries.values())
        questions = prompts.asks[b, :, 1].tolist()
        assert len(set(questions)) == len(questions)
        for question, answer, depth in zip(questions, prompts.answers[b], prompts.depths[b], strict=True):
            assert entries[question] == [(answer.item(), depth.item())]


def test_entries_stand_after_a_space_and_before_a_word(ledger, filler):
    prompts = build_prompts(ledger, filler, 1024, n_prompts=2, n_entries=64)
    for row in prompts.context:
        for [(_, position)] in read_back(ledger, row).values():
            assert row[position - 1] == ledger.space
            following = row[position + 1 :]
            prose = following[(following != ledger.space) & (following < N_PROSE_TOKENS)]
            assert ledger.starts_word[prose[0]]


def test_same_seed_same_prompts(ledger, filler):
    first, second, other = (build_prompts(ledger, filler, 512, 2, seed=seed) for seed in (3, 3, 4))
    for name, part in vars(first).items():
        assert torch.equal(part, getattr(second, name))
    assert not torch.equal(first.context, other.context)


def test_entries_reach_all_depths(ledger, filler):
    depths = build_prompts(ledger, filler, 1024, n_prompts=32).depths
    assert depths.min() < 64
    assert depths.max() > 960


def test_n_entries_stay_in_range():
    rng = np.random.default_rng(0)
    drawn = [draw_n_entries(rng, 8, 16) for _ in range(200)]
    assert set(drawn) == set(range(8, 17))


def test_too_many_entries_are_refused(ledger, filler):
    with pytest.raises(ValueError, match="do not hold 64 entries"):
        build_prompts(ledger, filler, 128, n_prompts=1, n_entries=64)


def test_a_tokenizer_without_ledger_is_refused():
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="lacks 584 ledger tokens"):
        Ledger.from_tokenizer(Tokenizer())


class Oracle(torch.nn.Module):
    """A model that remembers the entries fed through it, or that always says the first value."""

    device = torch.device("cpu")

    def __init__(self, ledger, remembers):
        super().__init__()
        self.ledger, self.remembers = ledger, remembers

    def forward(self, ids, **kwargs):
        fed = given_cache(kwargs)
        fed.append(ids)
        logits = torch.zeros(len(ids), 1, N_PROSE_TOKENS + N_LEDGER)
        for b, row in enumerate(torch.cat(fed, dim=1)):
            entries = read_back(self.ledger, row)
            [(answer, _)] = entries.get(row[-1].item(), [(self.ledger.answers[0], 0)])
            logits[b, 0, answer if self.remembers else self.ledger.answers[0]] = 1
        return type("Output", (), {"logits": logits})


def test_exact_match_counts_right_answers(ledger, filler):
    prompts = build_prompts(ledger, filler, 256, n_prompts=2, n_entries=8, n_questions=4)
    assert exact_match(Oracle(ledger, remembers=True), prompts, make_cache=list) == 1
    first = (prompts.answers == ledger.answers[0]).float().mean().item()
    assert exact_match(Oracle(ledger, remembers=False), prompts, make_cache=list) == pytest.approx(first)


def test_embedded_model_fits_and_retrieves():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(file.stat().st_size for file in embedded_model().iterdir()) <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    prose = tokenizer(embedded_prose().read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    prompts = build_prompts(Ledger.from_tokenizer(tokenizer), np.array(prose), 1024, n_prompts=6)
    assert exact_match(model, prompts) >= 0.95


def test_exact_match_leaves_the_prompts_alone(ledger, filler):
    prompts = build_prompts(ledger, filler, 256, n_prompts=1, n_entries=8)
    copy = LedgerPrompts(*(part.clone() for part in vars(prompts).values()))
    exact_match(Oracle(ledger, remembers=True), prompts, make_cache=list)
    for name, part in vars(prompts).items():
        assert torch.equal(part, getattr(copy, name))
