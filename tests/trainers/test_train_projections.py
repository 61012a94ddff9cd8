import json

import pytest
import torch
from cases import ARCHITECTURES, new_model, prompt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_kvcache as kv
from hf_kvcache import compat
from hf_kvcache.adapters import Bases
from hf_kvcache.adapters.decompose import decompose
from hf_kvcache.adapters.modules import full_attentions
from hf_kvcache.attention.interface import kv_mask
from hf_kvcache.codecs.basis import by_group
from hf_kvcache.models import embedded_prose
from hf_kvcache.trainers.train_projections import (
    IMPLEMENTATION,
    Distiller,
    Projector,
    Rotation,
    Windows,
    basis_of,
    collect,
    main,
    projected_attention,
    start_of,
)

SIZES = {"k": 1, "v": 2}


def rotation(n_groups=2, width=8, centred=True, angle=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(n_groups, width, width, generator=generator)).Q
    made = Rotation(start, torch.randn(n_groups, width, generator=generator) if centred else None)
    with torch.no_grad():
        made.skew.copy_(angle * torch.randn(n_groups, width, width, generator=generator))
    return made


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_a_rotation_starts_where_it_was_put_and_stays_orthogonal():
    still = rotation(angle=0.0)
    assert torch.allclose(still.matrix(), still.start, atol=1e-6)
    turned = rotation(angle=2.0).matrix()
    assert torch.allclose(turned.mT @ turned, torch.eye(8).expand(2, 8, 8), atol=1e-5)
    assert (turned - still.start).abs().max() > 0.1


@torch.enable_grad()
def test_every_angle_has_a_gradient():
    made = rotation(angle=0.1)
    made(torch.randn(1, 2, 5, 8), torch.tensor([4, 4])).square().sum().backward()
    above = made.skew.grad[:, *torch.triu_indices(8, 8, 1)]
    assert above.abs().min() > 0 and made.skew.grad.tril().abs().max() == 0
    assert made.mean.grad.abs().max() > 0


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("centred", [True, False])
def test_every_prefix_of_the_basis_projects_as_the_rotation_does(group_size, centred):
    made = rotation(4 // group_size, 8 * group_size, centred)
    x = torch.randn(2, 4, 50, 8)
    from hf_kvcache.codecs.fitting import Moments

    moments = Moments(4 // group_size, 8 * group_size)
    moments.add(by_group(x, group_size).transpose(0, 1).flatten(1, 2))
    basis = basis_of(made, moments, group_size)
    for rank in (1, 3, basis.rank):
        ours = made(x, torch.full((4 // group_size,), rank))
        kept = basis.truncated(rank)
        theirs = kept.decode(kept.encode(by_group(x, group_size)))
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(ours, x, atol=1e-4), "full rank must change nothing"


def test_ranks_are_drawn_for_every_group_on_its_own():
    module = full_attentions(new_model(ARCHITECTURES["llama"](), "sdpa"))[0].module
    projector = Projector(module, 16, "post", rotation(16, 48), rotation(16, 8))
    projector.draw()
    first = projector.ranks["k"]
    projector.draw()
    assert not torch.equal(first, projector.ranks["k"])
    assert set(projector.ranks["k"].tolist()) <= {16, 32, 48} and len(set(projector.ranks["k"].tolist())) > 1
    assert set(projector.ranks["v"].tolist()) == {8}, "heads of less than 16 channels have one rank"


def projectable(arch):
    compat.register_attention(IMPLEMENTATION, projected_attention)
    compat.register_mask(IMPLEMENTATION, kv_mask)
    return new_model(ARCHITECTURES[arch](), IMPLEMENTATION)


def distiller_of(model, rope, centre=True):
    moments = collect(model, prompt(6, 24), rope, SIZES)
    projectors = {}
    for i, attention in full_attentions(model).items():
        sides = {side: start_of(m, centre, None) for side, m in moments[i].items()}
        projectors[i] = Projector(attention.module, attention.head_dim, rope, sides["k"], sides["v"])
    return Distiller(model, projectors, 0.25), moments


def fix(distiller, rank, head_dim):
    for projector in distiller.projectors.values():
        projector.fix(rank, head_dim)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_full_rank_is_the_teacher_and_less_is_not(arch, rope):
    model = projectable(arch)
    with torch.no_grad():
        plain = model(prompt(2, 12), use_cache=False).logits.log_softmax(-1)
    distiller, _ = distiller_of(model, rope)
    # its attention may be another function, with gradients
    torch.testing.assert_close(distiller.teacher(prompt(2, 12)), plain, rtol=1e-5, atol=1e-5)
    head_dim = next(iter(full_attentions(model).values())).head_dim
    fix(distiller, head_dim, head_dim)
    assert (distiller.student(prompt(2, 12)) - plain).abs().max() < 1e-3
    fix(distiller, head_dim // 4, head_dim)
    assert (distiller.student(prompt(2, 12)) - plain).abs().max() > 1e-2
    with torch.no_grad():
        again = model(prompt(2, 12), use_cache=False).logits.log_softmax(-1)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_before_rope_the_student_is_the_decomposed_model(arch):
    model = projectable(arch)
    distiller, moments = distiller_of(model, "pre")
    fix(distiller, 4, 16)
    student = distiller.student(prompt(2, 12))
    layers = {
        i: {side: basis_of(getattr(distiller.projectors[str(i)], side), m, SIZES[side]) for side, m in own.items()}
        for i, own in moments.items()
    }
    report = decompose(model, Bases(layers).truncated({"k": 4, "v": 8}))
    assert all(row["replaced"] for row in report)
    assert (model(prompt(2, 12), use_cache=False).logits.log_softmax(-1) - student).abs().max() < 1e-3


@torch.enable_grad()
def test_distillation_brings_the_student_nearer():
    torch.manual_seed(0)
    distiller, _ = distiller_of(projectable("llama"), "post")
    windows, parameters = prompt(4, 24), list(distiller.parameters())
    assert len(parameters) == 2 * 2 * 2, "angles and means of two sides of two layers, and nothing of the model"
    before = distiller.divergence(windows, [4], 16)[4]
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(15):
        fix(distiller, 4, 16)
        expected, predicted = distiller.teacher(windows), distiller.student(windows)
        loss = torch.nn.functional.kl_div(predicted, expected, reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert distiller.divergence(windows, [4], 16)[4] < 0.7 * before


def test_windows_are_the_same_whenever_asked_for():
    stream = torch.arange(100)
    windows = Windows(stream, 10, None, 5, seed=3)
    assert torch.equal(windows[2]["input_ids"], Windows(stream, 10, None, 9, seed=3)[2]["input_ids"])
    assert not torch.equal(windows[2]["input_ids"], windows[3]["input_ids"])
    assert Windows(stream, 10, 7, 5, seed=3)[2]["input_ids"][0] == 7
    spread = windows.spread(3)
    assert spread.shape == (3, 10) and spread[0, 0] == 0 and spread[-1, -1] == 99
    with pytest.raises(ValueError, match="has 9 tokens"):
        Windows(stream[:9], 10, None, 5, seed=3)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of one head size, and the tokenizer of the embedded one."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(kv.embedded_model())
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id, **sizes)
    new_model(config, "sdpa").save_pretrained(folder)
    return folder


def arguments(model, output, steps, *more):
    return [
        *("--model", str(model), "--text", str(embedded_prose()), "--output", str(output), "--length", "32"),
        *("--steps", str(steps), "--warmup_steps", "1", "--accumulation", "2", "--save_steps", "2"),
        *("--logging_steps", "1", "--pca_windows", "4", "--eval_windows", "2", "--eval_ranks", "32", "16"),
        *more,
    ]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    with torch.enable_grad():
        return output, main(arguments(small, output, 2, "--group_size_v", "2"))


def log_of(output):
    return json.loads((output / "checkpoints" / "trainer_state.json").read_text())["log_history"]


def test_output_is_an_adapter_of_the_model(small, trained):
    output, scores = trained
    bases = Bases.load(output)
    bases.check_model(AutoModelForCausalLM.from_pretrained(small))
    assert bases.ranks == {i: {"k": 32, "v": 64} for i in range(2)}
    assert bases.rope == "post" and bases.base_model == str(small)
    for sides in bases.layers.values():
        for basis in sides.values():
            product = basis.down.mT @ basis.up.transpose(1, 2).flatten(2).mT
            assert torch.allclose(product, torch.eye(basis.rank).expand_as(product), atol=1e-3)
    assert scores["before"].keys() == scores["after"].keys() == {"eval_kl_rank_32", "eval_kl_rank_16"}
    assert scores["after"]["eval_kl_rank_32"] < 1e-4 < scores["after"]["eval_kl_rank_16"]
    assert scores["after"] != scores["before"], "nothing was trained"


def test_losses_are_logged(trained):
    losses = [entry for entry in log_of(trained[0]) if "loss" in entry]
    assert len(losses) == 2
    for entry in losses:
        assert entry["loss"] == pytest.approx(0.25 * entry["kl"] + 0.75 * entry["ce"], abs=1e-3)


def test_checkpoints_hold_the_projections_alone(trained):
    names = load_file(trained[0] / "checkpoints" / "checkpoint-2" / "model.safetensors").keys()
    assert names and all(name.startswith("projectors.") for name in names)


@torch.enable_grad()
def test_resume_goes_on_where_it_stopped(small, trained, tmp_path):
    import shutil

    output = tmp_path / "resumed"
    shutil.copytree(trained[0], output)
    main(arguments(small, output, 4, "--group_size_v", "2", "--resume", "true"))
    first, both = ([e for e in log_of(folder) if "loss" in e] for folder in (trained[0], output))
    assert [entry["step"] for entry in both] == [1, 2, 3, 4]
    assert both[:2] == first, "the first steps must not be taken again"


@torch.enable_grad()
def test_it_starts_from_calibrated_bases_too(small, trained, tmp_path):
    calibrated = Bases.load(trained[0]).truncated({"k": 24, "v": 40})
    calibrated.save(tmp_path / "calibrated")
    scores = main(arguments(small, tmp_path / "out", 1, "--bases", str(tmp_path / "calibrated"), "--bf16", "true"))
    bases = Bases.load(tmp_path / "out")
    assert bases.group_sizes == {"k": 1, "v": 2} and bases.rope == "post"
    assert bases.ranks[0] == {"k": 32, "v": 64}, "what is missing to a square is added"
    assert scores["before"]["eval_kl_rank_16"] == pytest.approx(trained[1]["after"]["eval_kl_rank_16"], rel=0.5)
