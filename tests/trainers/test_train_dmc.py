import json
import os
import shutil
import socket
import warnings

import numpy as np
import pytest
import torch
from cases import ARCHITECTURES, new_model, recompute
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, PreTrainedTokenizerFast

import hf_kvcache as kv
from hf_kvcache.adapters import attach
from hf_kvcache.calibration.facts import Facts
from hf_kvcache.dmc.files import load
from hf_kvcache.dmc.retrofitting import retrofits
from hf_kvcache.dmc.training import draw_noise
from hf_kvcache.models import embedded_prose
from hf_kvcache.trainers import dmc_losses, dmc_trainer, train_dmc
from hf_kvcache.trainers.dmc_data import FactMix, MixOptions, load_batches, load_stream
from hf_kvcache.trainers.dmc_losses import by_rows, ratio_of
from hf_kvcache.trainers.dmc_model import load_model, prepare, teacher_of
from hf_kvcache.trainers.dmc_options import Method, Optimisation, Texts, check
from hf_kvcache.trainers.dmc_schedule import Schedule
from hf_kvcache.trainers.dmc_trainer import RetrofitTrainer, teaching
from hf_kvcache.trainers.train_dmc import arguments_of, main


@pytest.fixture(autouse=True)
def with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of 64 words, and a text of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("small")
    words = ["<bos>", "<eos>", *(f"w{i}" for i in range(62))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes)
    new_model(config, "sdpa").save_pretrained(folder)
    # every word says which one comes next, but for noise
    rng = np.random.default_rng(0)
    text, word = [], 0
    for _ in range(4000):
        word = int(rng.integers(62)) if rng.random() < 0.2 else (word * 7 + 3) % 62
        text.append(f"w{word}")
    (folder / "text.txt").write_text(" ".join(text), encoding="utf-8")
    return folder


def arguments(small, out, *more, steps=(1, 1, 1)):
    phases = zip(("--zero-steps", "--ramp-steps", "--solid-steps"), map(str, steps))
    return [
        *("--model", str(small), "--out", str(out), "--data", str(small / "text.txt"), "--sequence", "24"),
        *(
            "--batch-size",
            "2",
            "--logging-steps",
            "1",
            "--save-steps",
            "0",
            *(part for pair in phases for part in pair),
        ),
        *("--attn", "hf_kvcache", *more),
    ]


def parsed(args):
    return HfArgumentParser((Texts, Method, Optimisation)).parse_args_into_dataclasses(args)


def new_trainer(small, out, *more, steps=(0, 10, 10)):
    """What `main` trains with."""
    texts, method, optimisation = parsed(arguments(small, out, *more, steps=steps))
    check(method, optimisation)
    model, _ = load_model(texts.model, texts.attn)
    tokenizer = AutoTokenizer.from_pretrained(texts.model)
    teacher = teacher_of(model, method, "sdpa")
    prepare(model, method, optimisation)
    schedule = Schedule(*steps, method.start_ratio, method.ratio, 0.1)
    args = arguments_of(texts.out, optimisation, schedule.n_steps)
    batches = load_batches(texts, optimisation, tokenizer, schedule.n_steps, 1)
    own = dict(schedule=schedule, method=method, optimisation=optimisation)
    own["teacher"] = teacher
    return RetrofitTrainer(**own, model=model.train(), args=args, train_dataset=batches, data_collator=lambda i: i[0])


def at_step(trainer, step):
    trainer.state.global_step = step
    now = trainer.schedule.at(step)
    for child in retrofits(trainer.model).values():
        child.fade, child.compresses = now.fade, now.compresses
    return trainer


def report_of(out):
    return json.loads((out / "training.json").read_text())


def log_of(out):
    return [entry for entry in report_of(out)["log"] if "loss" in entry]


def weights_of(out):
    return load_file(out / "model.safetensors")


# -- what a step does --------------------------------------------------------------------------------------------------


def test_phases():
    schedule = Schedule(zero_steps=10, ramp_steps=20, solid_steps=10, start_ratio=1.0, ratio=4.0, final_lr=0.1)
    assert schedule.n_steps == 40 and schedule.end_of_ramp == 30
    assert [schedule.at(step).fade for step in (0, 4, 8, 9, 10, 39)] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert [schedule.at(step).compresses for step in (0, 9, 10, 39)] == [False, False, True, True]
    assert [schedule.at(step).ratio for step in (5, 10, 20, 30, 39)] == [1.0, 1.0, 2.5, 4.0, 4.0]
    assert [schedule.at(step).lr for step in (0, 10, 30)] == [1.0, 1.0, 1.0]
    assert schedule.at(35).lr == pytest.approx(0.55) and schedule.at(40).lr == pytest.approx(0.1)
    later = Schedule(0, 20, 0, start_ratio=4.0, ratio=8.0, final_lr=0.1)
    assert [later.at(step).ratio for step in (0, 10, 20)] == [4.0, 6.0, 8.0]
    assert later.at(0).compresses and later.at(19).lr == 1.0


def test_borrowed_rows_fade_and_are_zero_afterwards(small, tmp_path):
    main(arguments(small, tmp_path, "--save-steps", "1", steps=(5, 1, 0)))
    saved = load_file(tmp_path / "checkpoints" / "checkpoint-5" / "model.safetensors")
    before = weights_of(small)
    for layer in (0, 1):
        for side, n_heads in (("q", 4), ("k", 2)):
            name = f"model.layers.{layer}.self_attn.{side}_proj.weight"
            rows = saved[name].unflatten(0, (n_heads, 8))
            assert rows[:, -1].abs().max() == 0, "before the checkpoint at the end of the phase"
            assert before[name].unflatten(0, (n_heads, 8))[:, -1].abs().max() > 0
            assert rows[:, :-1].abs().amax(2).min() > 0


def test_the_channel_fades_while_nothing_is_compressed(small, tmp_path, monkeypatch):
    seen = []
    compute_loss = RetrofitTrainer.compute_loss

    def spy(self, model, *args, **kwargs):
        seen.append({(child.fade, child.compresses) for child in retrofits(model).values()})
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(RetrofitTrainer, "compute_loss", spy)
    main(arguments(small, tmp_path, steps=(5, 1, 0)))
    assert seen == [{(1.0, False)}, {(0.75, False)}, {(0.5, False)}, {(0.25, False)}, {(0.0, False)}, {(0.0, True)}]


def test_two_steps_write_a_model_that_loads(small, tmp_path):
    report = main(arguments(small, tmp_path, "--window", "4", "--ratio", "3", steps=(1, 1, 1)))
    model = load(tmp_path)
    settings = next(iter(retrofits(model).values())).settings
    assert (settings.method, settings.window, settings.scale) == ("dmc", 4, 20.0)
    assert model.config.kv_dmc_facts["target_ratio"] == 3.0 and model.config.use_cache
    assert model.config.kv_dmc_facts["tokens_seen"] == report["tokens"] == 3 * 2 * 24
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 64
    before, after = weights_of(small), weights_of(tmp_path)
    assert all(not torch.equal(before[name], after[name]) for name in before), "every weight is trained"
    saved = report_of(tmp_path)
    assert np.shape(saved["shares"]) == (2, 2) and saved["ratio"] == report["ratio"]
    assert saved["settings"]["ratio"] == 3.0 and saved["settings"]["zero_steps"] == 1
    log = log_of(tmp_path)
    assert "hinge" not in log[0] and [entry["target"] for entry in log[1:]] == [1.0, 3.0]
    for entry in log[1:]:
        assert {"ce", "hinge", "ratio"} <= entry.keys() and len(entry["ratio_by_layer"]) == 2
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["hinge"], abs=2e-3)


@pytest.mark.parametrize("more", [(), ("--method", "dms", "--decision", "linear", "--window", "4")])
def test_resuming_equals_going_on(small, tmp_path, more):
    steps = (0, 3, 1) if more else (2, 1, 1)
    args = arguments(small, tmp_path / "a", "--save-steps", "2", *more, steps=steps)
    main(args)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "a/checkpoints/checkpoint-2", tmp_path / "b/checkpoints/checkpoint-2")
    main([*args, "--out", str(tmp_path / "b"), "--resume"])
    expected, resumed = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    half = load_file(tmp_path / "a/checkpoints/checkpoint-2/model.safetensors")
    for name, t in expected.items():
        assert torch.equal(resumed[name], t), name
        assert not torch.equal(half[name], t), "steps afterwards change it"
    assert log_of(tmp_path / "b")[-1]["loss"] == log_of(tmp_path / "a")[-1]["loss"]


# -- losses ------------------------------------------------------------------------------------------------------------


def gradients(trainer, step=5):
    at_step(trainer, step)
    trainer.compute_loss(trainer.model, trainer.train_dataset[0]).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_recomputing_layers_finds_the_same_gradients(small, tmp_path, method):
    more = ["--method", method, "--decision", "rows", "--offset", "0.5", "--window", "4"]
    expected = gradients(new_trainer(small, tmp_path, *more))
    trainer = new_trainer(small, tmp_path, *more, "--gradient-checkpointing")
    recompute(trainer.model)
    found = gradients(trainer)
    assert expected["model.layers.0.self_attn.kv_dmc.decision"].abs().max() > 1e-4
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)
    # noise of another step would show
    other = gradients(new_trainer(small, tmp_path, *more), step=6)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (other[name] - expected[name]).abs().max() > 1e-3 * expected[name].abs().max()


def test_reentrant_checkpointing_is_refused(small, tmp_path):
    trainer = new_trainer(small, tmp_path)
    recompute(trainer.model, use_reentrant=True)
    trainer.model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant"):
        gradients(trainer)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("teacher", ["start", "self"])
def test_nothing_to_distil_where_nothing_is_compressed(small, tmp_path, direction, teacher):
    def kd(*more, step=5, steps=(0, 10, 10)):
        options = ("--method", "dms", "--window", "2", "--decision", "rows", "--kd-direction", direction)
        options += ("--teacher", teacher)
        trainer = at_step(new_trainer(small, tmp_path, *options, *more, steps=steps), step)
        trainer.compute_loss(trainer.model, trainer.train_dataset[0])
        return trainer.parts["kd"][0].item()

    if teacher == "self":
        # which has lost the channel, too
        assert kd("--offset", "100") == pytest.approx(0, abs=1e-6)
    else:
        assert kd("--offset", "100", "--decision", "linear") == pytest.approx(0, abs=1e-6)
    assert kd("--offset", "0.1") > 1e-4
    # the teacher has the channel that the student is losing
    assert kd(steps=(10, 10, 10), step=0) == pytest.approx(0, abs=1e-6)
    assert kd(steps=(10, 10, 10), step=5) > 1e-5


def test_teaching_leaves_things_as_they_were(small, tmp_path):
    model = at_step(new_trainer(small, tmp_path, steps=(10, 1, 0)), 4).model
    children = list(retrofits(model).values())
    for child in children:
        child.compresses = True
    with pytest.raises(KeyError), teaching(model):
        assert {(child.fade, child.compresses) for child in children} == {(1.0, False)}
        raise KeyError
    assert {(child.fade, child.compresses) for child in children} == {(0.5, True)}


def test_the_teacher_stays_as_it_was(small, tmp_path):
    """Weights that teach themselves drift away from what the model knew; a copy does not."""
    kd = {}
    for teacher in ("start", "self"):
        options = ("--method", "dms", "--window", "4", "--decision", "linear", "--offset", "100", "--teacher", teacher)
        trainer = at_step(new_trainer(small, tmp_path, *options), 5)
        with torch.no_grad():
            for p in trainer.model.model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        trainer.compute_loss(trainer.model, trainer.train_dataset[0])
        kd[teacher] = trainer.parts["kd"][0].item()
    assert kd["self"] == pytest.approx(0, abs=1e-6) and kd["start"] > 1e-3


def test_losses_by_rows_are_those_of_all(monkeypatch):
    logits = torch.randn(10, 7, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(10, 7), torch.rand(10)

    def losses(s, t):
        assert len(s) <= 3 or dmc_losses.LOSS_ELEMENTS > 100
        return (s - t).square().sum(-1)

    whole = by_rows(losses, weights, logits, teacher)
    (expected,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(dmc_losses, "LOSS_ELEMENTS", 21)
    parts = by_rows(losses, weights, logits, teacher)
    (found,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


def test_the_hinge_makes_a_model_compress(small, tmp_path):
    more = ["--method", "dms", "--decision", "linear", "--window", "4", "--lr", "1e-3", "--ratio", "4"]
    more += ["--logging-steps", "5"]
    main(arguments(small, tmp_path / "with", *more, steps=(0, 10, 20)))
    main(arguments(small, tmp_path / "without", *more, "--hinge-weight", "0", steps=(0, 10, 5)))
    log = log_of(tmp_path / "with")
    assert log[0]["ratio"] < 2 and report_of(tmp_path / "with")["ratio"] > 3
    # the other loss moves decisions, too, but does not push them
    assert report_of(tmp_path / "without")["ratio"] < 2


@pytest.mark.parametrize("more", [(), ("--constant-ratio",)])
def test_what_the_hinge_is_asked(small, tmp_path, monkeypatch, more):
    asked = []
    monkeypatch.setattr(dmc_trainer, "hinge", lambda share, *args: (asked.append(args), share.mean())[1])
    weight = ("--hinge-weight", "0.5", "--ratio", "3", "--offset", "0.5")
    trainer = at_step(new_trainer(small, tmp_path, *weight, *more), 5)
    loss = trainer.compute_loss(trainer.model, trainer.train_dataset[0])
    assert asked == [(2.0, bool(more))]
    parts = {name: trainer.parts[name][0].item() for name in ("ce", "hinge")}
    assert parts["hinge"] > 0.1 and loss.item() == pytest.approx(parts["ce"] + 0.5 * parts["hinge"])


def test_it_says_when_nothing_is_compressed(small, tmp_path, unsaid):
    never = arguments(small, tmp_path / "a", "--scale", "1e-3", steps=(0, 2, 0))
    with pytest.warns(UserWarning, match=r"asks for 4 tokens per row.*keeps 1: .*raise --scale \(it is 0.001\)"):
        main(never)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the ramp is over")
        main([*never, "--ratio", "1.4", "--out", str(tmp_path / "b")])


# -- model -------------------------------------------------------------------------------------------------------------


def test_decisions_learn_faster(small, tmp_path):
    trainer = new_trainer(small, tmp_path, "--decision", "rows", "--lr", "1e-3", "--decision-lr-factor", "7")
    deciding = {id(w) for child in retrofits(trainer.model).values() for w in child.parameters()}
    groups = trainer.create_optimizer().param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    for group in groups:
        decides = {id(p) in deciding for p in group["params"]}
        assert decides in ({True}, {False})
        assert group["lr"] == pytest.approx(7e-3 if decides == {True} else 1e-3)
        assert not (decides == {True} and group["weight_decay"])
    scheduler = trainer.create_scheduler(20)
    assert scheduler.lr_lambdas[0](20) == pytest.approx(0.1)


def test_going_on_from_a_retrofitted_model(small, tmp_path):
    main(arguments(small, tmp_path / "a", "--window", "4", "--scale", "30"))
    on = arguments(small, tmp_path / "b", "--model", str(tmp_path / "a"), steps=(0, 2, 0))
    main([*on, "--start-ratio", "2", "--ratio", "6"])
    assert [entry["target"] for entry in log_of(tmp_path / "b")] == [2.0, 4.0]
    assert next(iter(retrofits(load(tmp_path / "b")).values())).settings.window == 4
    for more, message in (
        (("--window", "5"), "window is 4, not 5"),
        (("--window", "5", "--offset", "3"), "window is 4, not 5; offset is 5.0, not 3.0"),
        (("--decision", "rows"), "decision is 'borrowed', not 'rows'"),
        (("--method", "dms"), "method is 'dmc', not 'dms'"),
        (("--method", "none"), "not retrofitted, and this one is"),
        (("--zero-steps", "3"), "no channel to take out"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*on, *more])


def test_the_control_run_is_plain_training_on_the_same_text(small, tmp_path):
    main(arguments(small, tmp_path / "none", "--method", "none"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "none")
    assert not retrofits(model) and model.config.model_type == "llama"
    assert not torch.equal(weights_of(tmp_path / "none")["lm_head.weight"], weights_of(small)["lm_head.weight"])
    # the first step of the others compresses nothing, and reads the same
    main(arguments(small, tmp_path / "dmc"))
    assert log_of(tmp_path / "none")[0]["loss"] == pytest.approx(log_of(tmp_path / "dmc")[0]["loss"], rel=1e-4)
    assert "ratio" not in report_of(tmp_path / "none")


@pytest.mark.parametrize("rank", [0, 2])
def test_an_adapter_leaves_the_model_alone(small, tmp_path, rank, monkeypatch):
    seen = {}
    save_model = train_dmc.save_model
    monkeypatch.setattr(train_dmc, "save_model", lambda *a: (seen.setdefault(0, a[0]), save_model(*a)))
    more = ("--adapter", "--method", "dmc", "--offset", "0.5", "--decision-lr-factor", "50", "--lora-rank", str(rank))
    main(arguments(small, tmp_path, *more, steps=(0, 3, 0)))
    assert not (tmp_path / "config.json").exists() and (tmp_path / "lora").exists() == bool(rank)
    trained = seen[0].eval()
    own = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
    before = AutoModelForCausalLM.from_pretrained(small, attn_implementation="hf_kvcache").eval()
    assert len(own) == len(list(before.parameters()))
    for name, p in before.named_parameters():
        assert torch.equal(own[name if name in own else name.replace("_proj.", "_proj.base_layer.")], p), name
    ids = torch.randint(2, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, plain = trained(ids, use_cache=False).logits, before(ids, use_cache=False).logits
        attach(before, tmp_path, "dmc")
        assert set(before.peft_config) == ({"dmc", "dmc-lora"} if rank else {"dmc"})
        found = before(ids, use_cache=False).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected)
    if not rank:
        on = arguments(small, tmp_path / "on", "--adapter", "--model", str(tmp_path), steps=(0, 1, 0))
        model, _ = load_model(str(tmp_path), "hf_kvcache")
        torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, expected)
        main(on)
        assert (tmp_path / "on" / "adapter_config.json").exists()
    else:
        with pytest.raises(ValueError, match="goes with LoRA"):
            load_model(str(tmp_path), "hf_kvcache")


@pytest.mark.parametrize(
    "more, message",
    [
        (("--method", "none", "--loss", "kd"), "nothing to learn"),
        (("--method", "none", "--adapter"), "nothing to train"),
        (("--method", "none", "--window", "4"), "it has no window"),
        (("--start-ratio", "5"), "--start-ratio 5 must lie between 1 and --ratio 4"),
        (("--adapter", "--decision", "borrowed"), "use --decision rows or linear"),
        (("--teacher", "self"), "--teacher is for --loss kd"),
        (("--lora-rank", "4"), "--lora-rank is for --adapter"),
        (("--ramp-steps", "0", "--solid-steps", "0"), "nothing would be compressed"),
        (("--decision", "linear"), "no channel to take out"),
        (("--adapter", "--decision", "rows"), "no channel to take out, or nothing that could learn"),
        (("--offset", "-1"), "offset=-1.0 must be a positive number"),
        (("--sequence", "5000"), "has 4001 tokens, a sequence needs 5001"),
    ],
)
def test_refusals(small, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main([*arguments(small, tmp_path), *more])


def test_models_that_normalise_keys_need_weights_of_their_own(tmp_path):
    model = new_model(ARCHITECTURES["qwen3"]())
    with pytest.raises(ValueError, match="normalises queries and keys.*--decision linear"):
        prepare(model, Method(method="dmc"), Optimisation())


# -- text --------------------------------------------------------------------------------------------------------------


def test_windows_cover_the_text(small, tmp_path):
    data = new_trainer(small, tmp_path).train_dataset
    text = AutoTokenizer.from_pretrained(small)((small / "text.txt").read_text())["input_ids"]
    text = text[1:] if text[0] == 0 else text
    starts = []
    for i in range(20):
        batch = data[i]
        assert batch["input_ids"].shape == (2, 24) and (batch["input_ids"][:, 0] == 0).all()
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
        assert batch["weights"].sum() == pytest.approx(1)
        start = "".join(map(chr, text)).index("".join(map(chr, batch["labels"][0].tolist())))
        starts.append(start)
    assert max(starts) - min(starts) > 1500 and len(set(starts)) == 20


def test_ends_of_texts_need_not_count(small, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text("w1 w2 w3 w4")
    tokenizer = AutoTokenizer.from_pretrained(small)
    texts = Texts(out=tmp_path, model=str(small), data=tmp_path / "texts", sequence=24)
    stream = load_stream(texts.data, tokenizer, 10**6)
    assert stream.tolist() == [3, 4, 5, 6, 1] * 30
    for texts.skip_eos, expected in ((False, True), (True, False)):
        batch = load_batches(texts, Optimisation(batch_size=2), tokenizer, 4, 1)[1]
        is_end = batch["labels"] == 1
        assert is_end.any() and bool((batch["weights"][is_end] > 0).all()) is expected
        assert (batch["weights"][~is_end] > 0).all() and batch["weights"].sum() == pytest.approx(1)
    with pytest.raises(FileNotFoundError, match="no .txt files"):
        load_stream(small / "..", tokenizer, 1)


def test_of_long_texts_a_part_is_read(small):
    tokenizer = AutoTokenizer.from_pretrained(small)
    assert 100 < len(load_stream(small / "text.txt", tokenizer, 100)) < 400


def test_of_many_texts_few_are_read_in_whole_pieces(small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small)
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text("The miller looked at the river. " * (2000 if i % 2 else 2))
    end = tokenizer.eos_token_id
    n_texts = [int((load_stream(tmp_path, tokenizer, n) == end).sum()) for n in (1000, 10_000, 10**7)]
    assert n_texts[0] <= 2 < n_texts[1] <= 8 and n_texts[2] == 50


def test_facts_where_there_is_no_ledger(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(kv.embedded_model())
    texts = Texts(out=tmp_path, sequence=256, data=embedded_prose(), prose_share=0.5)
    stream = load_stream(texts.data, tokenizer, 10**6)
    facts = Facts(tokenizer, stream[stream != tokenizer.eos_token_id])
    mix = FactMix(stream, 256, 8, 4, tokenizer.bos_token_id, None, facts, MixOptions(0, [], 0, 0.5, 3.0, 0))
    batch = mix[2]
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    is_answer = batch["weights"] > batch["weights"].min() * 1.5
    assert 1 < is_answer.any(1).sum() < 8 and batch["weights"].sum() == pytest.approx(4)
    assert all(torch.equal(mix[2][name], batch[name]) for name in batch)


def test_ledgers_where_the_tokenizer_has_them(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(kv.embedded_model())
    texts, optimisation = Texts(out=tmp_path, sequence=256, data=embedded_prose()), Optimisation(batch_size=8)
    batches = load_batches(texts, optimisation, tokenizer, 4, 1)
    assert len(batches) == 4
    batch = batches[3]
    assert batch["input_ids"].shape == (8, 256)
    has_ledger = [any(f"k{i:02d}?" in tokenizer.decode(row) for i in range(64)) for row in batch["input_ids"]]
    assert 2 < sum(has_ledger) < 8
    assert batch["weights"].sum() == pytest.approx(2)
    texts.prose_share = 1.0
    batch = load_batches(texts, optimisation, tokenizer, 4, 1)[3]
    assert batch["weights"].sum() == pytest.approx(1)


def test_ratios():
    assert ratio_of(torch.tensor([[0.75, 0.25], [0.5, 0.5]])) == 2.0
    assert ratio_of(torch.ones(2, 2)) == 10000


def test_noise_is_that_of_the_batch(small, tmp_path):
    trainer = new_trainer(small, tmp_path)
    seeds = [trainer._seed(), trainer._seed()]
    trainer.state.global_step = 1
    seeds.append(trainer._seed())
    trainer.state.global_step = 0
    assert len(set(seeds)) == 3 and trainer._seed() == seeds[0]
    draw_noise(trainer.model, 2, 24, seeds[0])
    first, second = (child.noise for child in retrofits(trainer.model).values())
    assert first.shape == (2, 2, 24) and not torch.equal(first, second)


# -- several processes -------------------------------------------------------------------------------------------------


def train_on_two(rank, small, out, port, more):
    from accelerate.state import AcceleratorState

    # the parent's, which has trained alone
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(arguments(small, out, *more))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="importing everything anew takes two processes half a minute")
def test_two_processes_train_what_one_does_with_two_batches(small, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # rows are not used in the first phase, where DDP must not wait for them
    more = ("--decision", "rows", "--offset", "0.5", "--clip-norm", "0")
    torch.multiprocessing.start_processes(
        train_on_two, (small, tmp_path / "two", port, more), nprocs=2, start_method="fork"
    )
    main(arguments(small, tmp_path / "one", *more, "--accumulation", "2"))
    one, two, start = weights_of(tmp_path / "one"), weights_of(tmp_path / "two"), weights_of(small)
    assert one.keys() == two.keys() and len(one) == len(start) + 4
    for name, expected in one.items():
        moved = (expected - start.get(name, 0)).abs().mean()
        assert moved > 0 and (two[name] - expected).abs().mean() < 0.02 * moved, name
    for entry, expected in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert entry.get("ratio", 0) == pytest.approx(expected.get("ratio", 0), rel=1e-2)
    assert report_of(tmp_path / "two")["tokens"] == report_of(tmp_path / "one")["tokens"]
