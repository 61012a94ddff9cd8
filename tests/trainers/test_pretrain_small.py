import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_kvcache.eval.retrieval import Ledger, ledger_tokens
from hf_kvcache.trainers.pretrain_small import LedgerMix, PretrainConfig, load_tokenizer, load_tokens, main

TEXT = (
    "The miller looked at the river, and the river went by. “Is it deep?” he asked.\n\n"
    "“It was deep in my father's time,” said the old woman — “and nobody has been to see since.”\n\n"
)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for name in "one", "two":
        (folder / f"{name}.txt").write_text(name + "\n\n" + TEXT * 150, encoding="utf-8")
    return folder


def arguments(books, output, steps, *more):
    return [
        *("--books", str(books), "--valid_books", str(books), "--output", str(output)),
        *("--steps", str(steps), "--warmup_steps", "1", "--decay_steps", "1", "--save_steps", "2"),
        *("--tokens_per_batch", "512", "--curriculum", "128x1", "256x0"),
        *("--eval_lengths", "256", "--eval_batches", "1"),
        *("--vocab_size", "930", "--hidden_size", "64", "--intermediate_size", "64"),
        *("--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1"),
        *more,
    ]


@pytest.fixture(scope="module")
def trained(books, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    main(arguments(books, output, 2))
    return output


@pytest.fixture
def mix(books, trained):
    config = PretrainConfig(books, books, trained, tokens_per_batch=512, curriculum=["128x2", "256x0"])
    tokenizer = load_tokenizer(config)
    stream = load_tokens(books, tokenizer, trained / "train_tokens.npy")
    return LedgerMix(stream, Ledger.from_tokenizer(tokenizer), config)


def test_output_loads_with_auto_classes(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert text.shape[1] <= ids.shape[1] + 4


def test_tokenizer_round_trip(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "The “miller” went\n\n\tto k07=v3 the river, 12 × k63=v0. k07?v3 k63?"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert all(len(tokenizer(token, add_special_tokens=False).input_ids) == 1 for token in ledger_tokens())


@torch.enable_grad()
def test_resume_goes_on_where_it_stopped(books, trained):
    main(arguments(books, trained, 4, "--resume", "true"))
    state = json.loads((trained / "checkpoints" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert (trained / "checkpoints" / "checkpoint-4").exists()


def test_curriculum_sets_the_length(mix):
    assert mix[1]["input_ids"].shape == (4, 128)
    assert mix[2]["input_ids"].shape == (2, 256)


def test_labels_are_the_next_tokens(mix):
    batch = mix[5]
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert all(torch.equal(part, again) for part, again in zip(batch.values(), mix[5].values(), strict=True))


def test_weights_cover_prose_and_answers_only(mix):
    ledger = mix.ledger
    labels, weights = (torch.cat([mix[i][name] for i in range(2, 10)]) for name in ("labels", "weights"))
    is_noise = torch.from_numpy(np.isin(labels.numpy(), [*ledger.entries.ravel(), *ledger.questions]))
    is_answer = torch.from_numpy(np.isin(labels.numpy(), ledger.answers))
    assert is_noise.any() and is_answer.any()
    assert (weights[is_noise] == 0).all()
    assert (weights[:, :-1][is_noise[:, 1:]] == 0).all()
    assert (weights[is_answer] > 0).all()
    assert weights.sum().item() == pytest.approx(8 * (1 + mix.config.answer_weight), rel=1e-5)
