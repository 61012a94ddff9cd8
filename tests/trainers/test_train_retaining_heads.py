import json
import os
import shutil
import socket

import pytest
import torch
from cases import ARCHITECTURES, assert_close, new_model, prompt
from safetensors.torch import load_file
from torch.nn.functional import smooth_l1_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig

import hf_kvcache as kv
from hf_kvcache.adapters import RetainingHeads, attach
from hf_kvcache.calibration.agreement import agreement, kept_mass, overlap
from hf_kvcache.calibration.conversations import Conversations, messages_of, read_rows
from hf_kvcache.calibration.facts import Facts
from hf_kvcache.calibration.judging import TARGETS, Text, judge, judge_mass
from hf_kvcache.calibration.prompts import Arrange, Prompt, request_to_repeat
from hf_kvcache.calibration.synthetic import Synthetic
from hf_kvcache.models import embedded_prose
from hf_kvcache.trainers.train_retaining_heads import (
    Heads,
    HeadsInTraining,
    Optimisation,
    Prompts,
    main,
    retaining_loss,
)


def text_of(ids, n_judging):
    return Text(ids, None, ids.shape[1] - n_judging, n_judging)


# -- judges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "hf_kvcache", "eager"])
def test_judges_see_what_attention_does(implementation):
    model, ids = new_model(ARCHITECTURES["qwen3"](), "eager"), prompt(2, 40)
    weights = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    said, features = judge(model, text_of(ids, 12), {"mass": judge_mass})
    assert set(said["mass"]) == {0, 1} and features == {0: None, 1: None}
    for i, mass in said["mass"].items():
        expected = weights[i].unflatten(1, (2, -1))[..., -12:, :28].sum((2, 3))
        assert_close("mass", mass, expected, 1e-4)


def test_targets_of_padded_rows_are_those_of_the_rows_alone():
    model = new_model(ARCHITECTURES["llama"](), "sdpa")
    attach(model, RetainingHeads.new(model, d_r=8))
    ids = prompt(2, 90)
    prompts = [Prompt(ids[0, :40], ids[0, :40], ids[0, 40:52]), Prompt(ids[1, :30], ids[1, :30], ids[1, 30:60])]
    for name, judged_by in (("answer_max", "answer"), ("reconstruction", "repeat"), ("causal", "prompt")):
        arrange = Arrange(judged_by, request=torch.tensor([5, 6, 7]))
        both, features = judge(model, arrange(prompts), {"target": TARGETS[name]})
        for row, alone in enumerate(prompts):
            said, own = judge(model, arrange([alone]), {"target": TARGETS[name]})
            for i in (0, 1):
                n = len(alone.ids)
                expected, ours = said["target"][i][0], both["target"][i][row]
                assert torch.equal(ours[:, -n:].isfinite(), expected.isfinite())
                assert (ours[:, :-n] == -torch.inf).all()
                assert_close(name, ours[:, -n:].nan_to_num(neginf=0), expected.nan_to_num(neginf=0), 2e-3)
                assert_close("features", features[i][row, -n:], own[i][0], 1e-3)


@pytest.mark.parametrize("arch", ["gemma3", "phi3"])
def test_only_full_attention_is_judged(arch):
    model = new_model(ARCHITECTURES[arch](), "sdpa")
    heads = RetainingHeads.new(model, d_r=8)
    attach(model, heads)
    ids = prompt(1, 40)
    for _ in range(2):
        said, features = judge(model, text_of(ids, 12), {"target": TARGETS["answer_max"]})
        assert set(said["target"]) == set(features) == set(heads.layers)
        assert all(x.shape == (1, 28, heads.feature_dim) for x in features.values())


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_layouts_of_a_batch():
    first = Prompt(torch.tensor([1, 10, 11, 12]), torch.tensor([11, 12]), torch.tensor([20]))
    second = Prompt(torch.tensor([1, 13]), torch.tensor([13]), torch.tensor([21, 22, 23]))
    text = Arrange("answer")([first, second])
    assert text.ids.tolist() == [[1, 10, 11, 12, 20, 0, 0], [0, 0, 1, 13, 21, 22, 23]]
    assert text.is_real.long().tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert (text.n_prompt, text.n_judging) == (4, 3)
    text = Arrange("repeat", request=torch.tensor([7, 8]), bos=1)([first, second])
    assert text.ids[0].tolist() == [1, 10, 11, 12, 7, 8, 10, 11, 12]
    assert text.ids[1].tolist() == [0, 0, 1, 13, 7, 8, 13, 0, 0]
    assert (text.n_prompt, text.n_judging) == (4, 3)
    text = Arrange("answer", bos=1, n_query=2)([first])
    assert text.is_real is None
    assert text.ids[0].tolist() == [1, 11, 12, 10, 11, 12, 20], "the query comes first, after what opens a text"
    assert (text.n_prompt, text.n_judging) == (6, 1)
    assert Arrange("prompt")([first]).ids.tolist() == [[1, 10, 11, 12]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(kv.embedded_model())


LONG = embedded_prose().read_text(encoding="utf-8")[:60_000]


def synthetic(tokenizer, **options):
    import numpy as np

    text = options.pop("text", "The miller looked at the river, and the river went by. " * 40)
    stream = np.array(tokenizer(text)["input_ids"][1:])
    options = dict(prompt_tokens=200, answer_tokens=20, prose_share=0.5, n_query=0, n=12, seed=0) | options
    return Synthetic(tokenizer, stream, **options)


def test_ledger_and_prose(tokenizer):
    prompts = [synthetic(tokenizer)[i] for i in range(12)]
    assert all(len(p.ids) == 200 and p.ids[0] == tokenizer.bos_token_id for p in prompts)
    assert torch.equal(prompts[3].ids, synthetic(tokenizer)[3].ids)
    has_ledger = ["=" in tokenizer.decode(p.ids) for p in prompts]
    assert 2 < sum(has_ledger) < 10
    for found, p in zip(has_ledger, prompts):
        if found:
            key, _, value = tokenizer.decode(p.answer).strip().partition("?")
            assert f"{key}={value[:2]}" in tokenizer.decode(p.ids)
            assert len(p.answer) == 3 * tokenizer.decode(p.ids).count("=")
        else:
            assert len(p.answer) == 20 and len(p.query) == 0
    one = synthetic(tokenizer, prose_share=0, n_query=2)[0]
    assert torch.equal(one.answer[:2], one.query) and len(one.answer) == 3


def test_facts_where_there_is_no_ledger(tokenizer):
    windows = synthetic(tokenizer, prompt_tokens=1000, answer_tokens=200, prose_share=0, text=LONG)
    windows.ledger, windows.facts = None, Facts(tokenizer, windows.stream)
    p = windows[0]
    assert len(p.ids) == 1000 and len(p.answer) <= 200
    windows.n_query = 8
    p = windows[0]
    assert torch.equal(p.answer[: len(p.query)], p.query)


def test_conversations(tokenizer, tmp_path):
    long = {"instruction": "one two three four five six " * 20, "output": "seven " * 50}
    share = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "Bye."},
        ]
    }
    (tmp_path / "a.json").write_text(json.dumps([long, share, {"instruction": "no answer"}]))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [long, share])))
    (tmp_path / "a.txt").write_text("{}")
    assert read_rows(tmp_path / "a.txt") is None and len(read_rows(tmp_path / "a.jsonl")) == 2
    prompts = Conversations(read_rows(tmp_path / "a.json"), tokenizer, 31, 10)
    assert len(prompts) == 2
    assert len(prompts[0].ids) == 31 and len(prompts[0].answer) == 10
    assert tokenizer.decode(prompts[1].ids, skip_special_tokens=True) == "Be brief.\nHello?\n"
    assert tokenizer.decode(prompts[1].answer) == "Hello!"
    assert messages_of({"conversations": [{"from": "gpt", "value": "out of the blue"}]}) is None
    with pytest.raises(ValueError, match="no row is"):
        Conversations([{"instruction": "no answer"}], tokenizer, 31, 10)


def test_chat_templates_are_used(tokenizer, monkeypatch):
    template = "<|bos|>{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = Conversations([{"instruction": "Hello?", "output": "Bye."}], tokenizer, 99, 9)[0].ids
    assert tokenizer.decode(ids) == "<|bos|><user>Hello?\n<assistant>"
    assert tokenizer.decode(request_to_repeat(tokenizer)).startswith("<user>Repeat the")


# -- loss and measures -------------------------------------------------------------------------------------------------


def test_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    predicted, target = ({i: 2 * torch.randn(2, 3, 50, generator=generator) for i in range(4)} for _ in range(2))
    losses = retaining_loss(predicted, target, alpha=0.0025)
    p, t = (torch.stack(list(scores.values())) for scores in (predicted, target))
    difference = (p - t).abs()
    regression = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    smooth = sum(((p[i, ..., 1:] - p[i, ..., :-1]) ** 2).mean() for i in range(4))
    assert_close("regression", losses["regression"], regression, 1e-6)
    assert_close("regression", losses["regression"], smooth_l1_loss(p, t), 1e-6)
    assert_close("smoothness", losses["smoothness"], smooth, 1e-5)
    assert_close("loss", losses["loss"], regression + 0.0025 * smooth, 1e-6)


@torch.enable_grad()
def test_tokens_without_a_target_do_not_count():
    scores = torch.randn(1, 3, 50, requires_grad=True)
    target = torch.randn(1, 3, 50)
    alone = retaining_loss({0: scores[..., 8:45]}, {0: target[..., 8:45]}, 0.5)["loss"]
    target[..., :8] = target[..., 45:] = -torch.inf
    loss = retaining_loss({0: scores}, {0: target}, 0.5)["loss"]
    assert_close("loss", loss.detach(), alone.detach(), 1e-6)
    loss.backward()
    assert scores.grad.isfinite().all() and (scores.grad[..., :8] == 0).all() and scores.grad.abs().max() > 0


def test_overlap_and_mass():
    target = torch.rand(1, 2, 1000, generator=torch.Generator().manual_seed(0))
    assert overlap(target, target).tolist() == [1, 1]
    assert overlap(-target, target).tolist() == [0, 0]
    assert (overlap(target.roll(1, -1), target) - 0.1).abs().max() < 0.1
    padded = torch.cat([target.new_full((1, 2, 300), -torch.inf), target], -1)
    guess = torch.cat([target.new_full((1, 2, 300), 9.0), target], -1)
    assert overlap(guess, padded).tolist() == [1, 1], "what has no target is not chosen"
    assert_close("mass", kept_mass(target, torch.ones_like(target), 100), torch.full((2,), 0.1), 1e-6)
    assert kept_mass(target, target, 500).min() > 0.7


# -- the script --------------------------------------------------------------------------------------------------------


def test_every_argument_has_help():
    parser = HfArgumentParser((Prompts, Heads, Optimisation))
    assert all(action.help for action in parser._actions)


def test_warm_up_is_two_thirds_unless_given():
    assert Optimisation().n_warmup == 2000
    assert Optimisation(max_steps=30).n_warmup == 20
    assert Optimisation(max_steps=30, warmup_steps=0).n_warmup == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """A random model with the tokenizer of the embedded one."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id, **sizes)
    new_model(config, "sdpa").save_pretrained(folder)
    return folder


def arguments(model, out, steps, *more):
    return [
        *("--model", str(model), "--out", str(out), "--max-steps", str(steps), "--prompt-tokens", "200"),
        *("--answer-tokens", "16", "--d-r", "8", "--save-steps", "2", "--logging-steps", "1"),
        *("--valid-prompts", "2", "--n-recent", "8", *more),
    ]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    with torch.enable_grad():
        return out, main(arguments(small, out, 2))


def log_of(out):
    return [e for e in json.loads((out / "training.json").read_text())["log"] if "loss" in e]


def test_output_is_an_adapter_of_the_model(small, trained):
    out, scores = trained
    heads, model = RetainingHeads.load(out), AutoModelForCausalLM.from_pretrained(small)
    heads.check_model(model)
    assert heads.d_r == 8 and heads.target == "answer_max" and heads.base_model == str(small)
    new = RetainingHeads.new(model, 8, 42)
    assert all((heads.tensors[name] - t).abs().max() > 0 for name, t in new.tensors.items()), "nothing was trained"
    assert json.loads((out / "training.json").read_text())["held out"] == scores
    assert 0 <= scores["mass"] <= scores["mass_most"] <= 1 and scores["mass_target"] <= scores["mass_most"]


def test_losses_are_logged(trained):
    for entry in log_of(trained[0]):
        assert entry["loss"] == pytest.approx(entry["regression"] + 0.0025 * entry["smoothness"], rel=1e-2)
        assert 0 <= entry["overlap"] <= 1


def test_checkpoints_hold_the_heads_alone(trained):
    names = load_file(trained[0] / "checkpoints" / "checkpoint-2" / "model.safetensors").keys()
    assert sorted(names) == ["fc1.0", "fc1.1", "fc2.0", "fc2.1"]


@torch.enable_grad()
def test_resume_goes_on_where_it_stopped(small, trained, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(trained[0], out)
    main(arguments(small, out, 4, "--resume", "true"))
    first, both = log_of(trained[0]), log_of(out)
    assert [entry["step"] for entry in both] == [1, 2, 3, 4]
    assert both[:2] == first, "the first steps must not be taken again"


@torch.enable_grad()
@pytest.mark.parametrize(
    "more",
    [
        ["--target", "reconstruction", "--batch-size", "2"],
        ["--target", "causal"],
        ["--query-aware", "true", "--n-query", "4", "--bf16", "true"],
        ["--target", "answer_weight", "--recorded", "3", "--batch-size", "2", "--bf16", "true"],
    ],
    ids=["reconstruction", "causal", "query-aware", "recorded"],
)
def test_other_ways_to_train(small, tmp_path, more):
    main(arguments(small, tmp_path, 2, *more))
    heads = RetainingHeads.load(tmp_path)
    assert heads.target == (more[1] if more[0] == "--target" else "answer_max")
    assert (heads.query_aware, heads.n_query) == (("--query-aware" in more), 4 if "--query-aware" in more else None)
    assert all(t.dtype == torch.float32 for t in heads.tensors.values())


@torch.enable_grad()
def test_conversations_are_trained_on(small, tmp_path):
    rows = [{"instruction": "What is the river? " * n, "output": "It goes by."} for n in range(3, 9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = main(arguments(small, tmp_path / "out", 3, "--data", str(tmp_path / "data.jsonl"), "--batch-size", "2"))
    assert len(log_of(tmp_path / "out")) == 3 and 0 < scores["mass"] < 1


@torch.enable_grad()
def test_training_lifts_the_overlap_above_chance(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), dtype=torch.float32)
    heads = RetainingHeads.new(model, d_r=32)
    attach(model, heads)
    trained = HeadsInTraining(model, heads, "answer_max", 0.0025)
    assert len(list(trained.parameters())) == 8, "two matrices of four layers, and nothing of the model"
    windows = synthetic(tokenizer, prompt_tokens=128, n=40)
    arrange = Arrange("answer")
    optimiser = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    for i in range(36):
        optimiser.zero_grad()
        trained(**vars(arrange([windows[i]])))["loss"].backward()
        optimiser.step()
    held_out = [windows[i] for i in range(36, 40)]
    scores = agreement(model, trained.scores, TARGETS["answer_max"], held_out, arrange, arrange, 16, 8)
    assert scores["overlap"] > 0.2, "by chance it is 0.1"
    assert scores["mass"] > scores["mass_random"]


# -- several processes -------------------------------------------------------------------------------------------------


def train_on_two(rank, model, out, port):
    from accelerate.state import AcceleratorState

    # the parent's, which has trained alone
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(arguments(model, out, 3))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="importing everything anew takes two processes half a minute")
@torch.enable_grad()
def test_two_processes_train_what_one_does_with_two_prompts(small, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = train_on_two, (str(small), str(tmp_path / "two"), port)
    torch.multiprocessing.start_processes(*task, nprocs=2, start_method="fork")
    main(arguments(small, tmp_path / "one", 3, "--batch-size", "2"))
    one, two = (RetainingHeads.load(tmp_path / name) for name in ("one", "two"))
    new = RetainingHeads.new(AutoModelForCausalLM.from_pretrained(small), 8, 42)
    for name, expected in one.tensors.items():
        moved = (expected - new.tensors[name]).abs().mean()
        assert (two.tensors[name] - expected).abs().mean() < 0.02 * moved, name
    for entry, expected in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
