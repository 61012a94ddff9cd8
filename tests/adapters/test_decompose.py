"""Projections as low-rank factors: the model's own keys and values become what the cache would keep of them."""

import pytest
import torch
from cases import prompt
from tiny_bases import FAMILIES, model_of, random_bases
from transformers import DynamicCache

from hf_kvcache.adapters import AdapterError, LowRankLinear, attach, attached_basis, load_decomposed
from hf_kvcache.adapters.decompose import decompose
from hf_kvcache.adapters.modules import attentions, full_attentions
from hf_kvcache.codecs.basis import by_group
from hf_kvcache.compat import cache_argument

SMALL = dict(ranks=(4, 8), group_sizes=(1, 2))


def projected(x, basis):
    """What a cache over `basis` keeps of `[B, Hkv, n, D]`."""
    return basis.decode(basis.encode(by_group(x.double(), basis.group_size)))


class Recorded:
    """Outputs of the projections of every layer over one forward, `[B, Hkv, n, D]` by layer and side."""

    def __init__(self, model, ids):
        self.rows, hooks = {}, []
        for i, attention in attentions(model).items():
            for side in "kv":
                projection = getattr(attention.module, f"{side}_proj")
                hooks.append(projection.register_forward_hook(self.keep(i, side, attention.head_dim)))
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()

    def keep(self, i, side, head_dim):
        def hook(module, args, output):
            self.rows[i, side] = args[0], output.unflatten(-1, (-1, head_dim)).transpose(1, 2)

        return hook


def double(bases):
    return bases.to(torch.float64)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "plain"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma", "gemma2"])
def test_rows_are_the_projection_of_the_original_ones(arch, centred):
    model = model_of(arch)
    if arch == "qwen2":
        for attention in attentions(model).values():
            # as it is made, the bias is zero
            torch.nn.init.normal_(attention.module.k_proj.bias)
            torch.nn.init.normal_(attention.module.v_proj.bias)
    bases = random_bases(model, centred=centred, **SMALL)
    originals = {
        (i, side): getattr(a.module, f"{side}_proj") for i, a in full_attentions(model).items() for side in "kv"
    }
    report = decompose(model, bases)
    assert all(row["replaced"] for row in report) and len(report) == len(originals)
    recorded = Recorded(model, prompt(2, 12))
    for (i, side), original in originals.items():
        assert isinstance(getattr(attentions(model)[i].module, f"{side}_proj"), LowRankLinear)
        hidden, rows = recorded.rows[i, side]
        plain = original(hidden).unflatten(-1, (-1, rows.shape[-1])).transpose(1, 2)
        due = projected(plain, double(bases).of(i, side))
        scale = due.abs().max()
        assert (rows - due).abs().max() < 1e-5 * max(scale, 1)
        assert (rows - plain).abs().max() > 1e-2 * scale, "nothing would have been tested"


def test_bfloat16_differs_by_its_rounding():
    model = model_of("llama", torch.bfloat16)
    bases = random_bases(model, **SMALL)
    original = attentions(model)[0].module.v_proj
    decompose(model, bases)
    x = torch.randn(2, 5, 32)
    rows = attentions(model)[0].module.v_proj(x.bfloat16())
    assert rows.dtype == torch.bfloat16
    plain = original.float()(x.bfloat16().float()).unflatten(-1, (-1, 16)).transpose(1, 2)
    due = projected(plain, double(bases).of(0, "v")).transpose(1, 2).flatten(2)
    assert (rows - due).abs().max() < 0.03 * due.abs().max()


def test_full_rank_generates_the_same_tokens():
    model = model_of("llama")
    bases = random_bases(model, ranks=(16, 32), alternate=0)
    expected = model.generate(prompt(), max_new_tokens=8, do_sample=False)
    for i, attention in attentions(model).items():
        for side in "kv":
            # put in by hand: `decompose` leaves out factors that save nothing
            linear = getattr(attention.module, f"{side}_proj")
            setattr(attention.module, f"{side}_proj", LowRankLinear.of(linear, bases.of(i, side)))
    assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize(
    ("arch", "rope", "k_reason", "v_reason"),
    [
        ("llama", "post", "after RoPE", None),
        ("qwen3", "pre", "norm", None),
        ("gemma3", "pre", "norm", None),
        ("phi3", "pre", "fused", "fused"),
    ],
)
def test_what_would_not_be_exact_is_left_and_said(arch, rope, k_reason, v_reason):
    model = model_of(arch)
    report = decompose(model, random_bases(model, rope=rope, **SMALL))
    for row in report:
        reason = k_reason if row["side"] == "k" else v_reason
        assert row["replaced"] == (reason is None)
        assert row["reason"] is None if reason is None else reason in row["reason"]
        assert (row["n_parameters"] < row["n_parameters_before"]) == row["replaced"]
        assert (row["flops"] < row["flops_before"]) == row["replaced"]
    replaced = {name for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert replaced == {row["module"] for row in report if row["replaced"]}


def test_factors_that_would_be_larger_are_left_out():
    model = model_of("llama")
    report = decompose(model, random_bases(model, ranks=(16, 32), alternate=0))
    assert not any(row["replaced"] for row in report)
    assert "parameters" in report[0]["reason"]


def test_the_report_counts_what_is_there():
    model = model_of("llama")
    before = sum(p.numel() for p in model.parameters())
    report = decompose(model, random_bases(model, **SMALL))
    saved = sum(row["n_parameters_before"] - row["n_parameters"] for row in report)
    assert sum(p.numel() for p in model.parameters()) == before - saved
    # two groups of rank 4: down 8 x 32, up 2 x 4 x 16, and a bias of 32 that the mean makes
    assert report[0]["n_parameters"] == 8 * 32 + 2 * 4 * 16 + 32


def test_bases_of_another_model_replace_nothing():
    model = model_of("llama")
    with pytest.raises(AdapterError):
        decompose(model, random_bases(model_of("gemma2")))
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


def test_lora_is_left_alone():
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    bases = random_bases(model, **SMALL)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["k_proj"]))
    report = decompose(model, bases)
    assert [row["replaced"] for row in report] == [False, True] * 2
    assert "not a plain linear" in report[0]["reason"]


def test_saved_and_loaded_again(tmp_path):
    from safetensors.torch import load_file

    model = model_of("qwen2")
    bases = random_bases(model, **SMALL)
    decompose(model, bases)
    expected = model(prompt(1, 12), **cache_argument(DynamicCache())).logits
    model.save_pretrained(tmp_path)
    for state in (model.state_dict(), load_file(tmp_path / "model.safetensors")):
        again = model_of("qwen2", seed=1)
        load_decomposed(again, state)
        assert torch.equal(again(prompt(1, 12)).logits, expected)
        assert type(again.model.layers[0].self_attn.k_proj) is LowRankLinear
    state = model.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        load_decomposed(model_of("qwen2"), state)
    with pytest.raises(AdapterError, match="no model.layers.0.self_attn.k_proj"):
        load_decomposed(model_of("phi3"), model.state_dict())


def test_adapters_go_on_a_decomposed_model_and_stay_on_one():
    pytest.importorskip("peft")
    model, bases = model_of("llama"), random_bases(model_of("llama"), **SMALL)
    attach(model, bases)
    decompose(model, bases)
    bases.check_model(model)
    assert attached_basis(attentions(model)[0].module, "k")[0].rank == 4
    again = model_of("llama")
    decompose(again, bases)
    attach(again, bases)
    assert attached_basis(attentions(again)[1].module, "v")[0].rank == 7


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_runs(arch):
    model = model_of(arch)
    decompose(model, random_bases(model, **SMALL))
    assert model(prompt(2, 12)).logits.isfinite().all()
