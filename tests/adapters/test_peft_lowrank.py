"""Low-rank bases as a PEFT adapter: every way in and out, several at once, LoRA beside it."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from cases import generate, prompt
from safetensors.torch import load_file, save_file
from tiny_bases import FAMILIES, assert_same_bases, model_of, random_bases
from transformers import AutoModelForCausalLM

from hf_kvcache.adapters import AdapterError, Bases, attach, attached_basis
from hf_kvcache.adapters.modules import attentions, full_attentions

peft = pytest.importorskip("peft")
peft_verbs = pytest.importorskip("peft_verbs")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return model_of("llama")


@pytest.fixture
def bases(model):
    return random_bases(model, cache={"class": "LowRankCache", "kwargs": {"bits": 4}})


@pytest.fixture
def adapter(bases, model, tmp_path):
    return bases.save(tmp_path / "adapter", model)


def found(model, side="k", layer_idx=0):
    return attached_basis(attentions(model)[layer_idx].module, side)


def assert_carries(model, bases):
    """Every attention module of `model` offers what `bases` have for it, and nothing else."""
    for i, attention in attentions(model).items():
        for side in "kv":
            offered, due = attached_basis(attention.module, side), bases.of(i, side)
            assert (offered is None) == (due is None), f"layer {i}, {side}"
            if due is not None:
                basis, rope = offered
                assert rope == bases.rope
                assert basis.tensors.keys() == due.tensors.keys()
                assert all(torch.equal(t, due.tensors[part].float()) for part, t in basis.tensors.items())


def logits(model):
    with torch.no_grad():
        return model(prompt(2, 12)).logits


# -- in and out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_loads_what_was_saved(arch, tmp_path):
    bases = random_bases(model_of(arch), rope="post" if arch == "phi3" else "pre")
    bases.save(tmp_path, model_of(arch))
    expected = logits(model_of(arch))
    for load in (
        lambda: peft.PeftModel.from_pretrained(model_of(arch), tmp_path),
        lambda: peft.PeftModel.from_pretrained(model_of(arch), tmp_path, low_cpu_mem_usage=True),
        lambda: by_transformers(model_of(arch), tmp_path),
        lambda: attached(model_of(arch), bases),
        lambda: attached(model_of(arch), tmp_path),
    ):
        model = load()
        assert_carries(model, bases)
        assert torch.equal(logits(model), expected), "the adapter alone must not change the model"
    windowed = attentions(model).keys() - full_attentions(model).keys()
    assert windowed == ({0, 2} if arch in ("gemma2", "gemma3") else set())
    assert not any(hasattr(attentions(model)[i].module, "kv_lowrank") for i in windowed)


def by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


def attached(model, bases):
    attach(model, bases)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_saves_is_what_we_save(model, bases, tmp_path, dtype):
    bases = bases.to(dtype)
    bases.save(tmp_path / "ours", model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "ours", autocast_adapter_dtype=False)
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert_same_bases(bases.to(torch.float32), Bases.load(tmp_path / "theirs").to(torch.float32))
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours.items() <= theirs.items()


def test_auto_class_finds_the_base_model(model, bases, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = replace(bases, base_model=str(tmp_path / "base"))
    made.save(tmp_path / "adapter", base)
    assert_carries(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), made)
    assert_carries(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), made)


def test_transformers_saves_what_was_attached(model, bases, tmp_path):
    attach(model, bases)
    if not peft_verbs.save_pretrained(model, tmp_path):
        bases.save(tmp_path, model)
    assert_same_bases(replace(bases, base_model=""), replace(Bases.load(tmp_path), base_model=""))


def test_get_peft_model_starts_with_the_leading_channels(model):
    from hf_kvcache.adapters import LowRankKVConfig

    wrapped = peft.get_peft_model(model, LowRankKVConfig(ranks_k=4, ranks_v=6, group_size_v=2))
    config = wrapped.peft_config["default"]
    assert (config.ranks_k, config.n_kv_heads, config.head_dim) == ([4, 4], 2, 16)
    for side, rank in ("k", 4), ("v", 6):
        basis, _ = found(wrapped, side)
        x = torch.randn(1, basis.n_groups, 5, basis.width)
        assert torch.equal(basis.encode(x), x[..., :rank])
        assert torch.equal(basis.decode(basis.encode(x))[0, 0, :, :rank], x[0, 0, :, : min(rank, 16)])
    assert not any(p.requires_grad for p in wrapped.parameters()), "there is nothing to train"


def test_a_config_that_does_not_fit_raises_and_touches_nothing(model, bases, adapter):
    from hf_kvcache.adapters import LowRankKVConfig

    for config, message in (
        (LowRankKVConfig(ranks_k=99), "ranks_k"),
        (LowRankKVConfig(ranks_k=4, group_size_k=3), "group_size_k"),
        (LowRankKVConfig(ranks_k=4, n_kv_heads=4), "KV heads"),
        (LowRankKVConfig(), "neither"),
    ):
        with pytest.raises(AdapterError, match=message):
            peft.get_peft_model(model, config)
    other = model_of("llama", seed=1)
    for load in (lambda: peft.PeftModel.from_pretrained(other, adapter), lambda: attach(other, bases)):
        with pytest.raises(AdapterError, match="weights"):
            load()
    for touched in (model, other):
        assert not any("kv_lowrank" in name for name, _ in touched.named_modules())


def test_a_later_format_is_refused_by_peft_too(model, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"format_version": 2}))
    with pytest.raises(AdapterError, match="format_version 2"):
        peft.PeftModel.from_pretrained(model, adapter)


# -- several, on and off -----------------------------------------------------------------------------------------------


def test_several_adapters_take_turns(model, bases, adapter, tmp_path):
    other = random_bases(model, ranks=(4, 5), group_sizes=(2, 1), centred=False, rope="post", seed=1)
    other.save(tmp_path / "other", model)
    wrapped = peft.PeftModel.from_pretrained(model, adapter, adapter_name="a")
    wrapped.load_adapter(str(tmp_path / "other"), "b")
    assert_carries(wrapped, bases)
    wrapped.set_adapter("b")
    assert_carries(wrapped, other)
    wrapped.set_adapter("a")
    assert_carries(wrapped, bases)
    with wrapped.disable_adapter():
        assert found(wrapped) is None
    assert_carries(wrapped, bases)

    wrapped.save_pretrained(tmp_path / "both")
    assert_same_bases(bases, Bases.load(tmp_path / "both" / "a"))
    assert_same_bases(other, Bases.load(tmp_path / "both" / "b"))

    wrapped.delete_adapter("a")
    assert_carries(wrapped, other)
    wrapped.delete_adapter("b")
    assert found(wrapped) is None


def test_transformers_own_methods_take_turns_too(model, bases):
    other = random_bases(model, ranks=(4, 5), seed=1)
    attach(model, bases, "a")
    attach(model, other, "b")
    assert_carries(model, other)
    peft_verbs.set_adapter(model, "a")
    assert_carries(model, bases)
    peft_verbs.disable_adapters(model)
    assert found(model) is None
    peft_verbs.enable_adapters(model)
    assert_carries(model, bases)
    peft_verbs.delete_adapter(model, "a")
    assert_carries(model, other)
    with pytest.raises(AdapterError, match="'b' already"):
        attach(model, bases, "b")


def test_unload_takes_everything_off(model, adapter):
    expected, keys = logits(model), model.state_dict().keys()
    plain = peft.PeftModel.from_pretrained(model, adapter).unload()
    assert plain.state_dict().keys() == keys
    assert torch.equal(logits(plain), expected)
    assert_carries(peft.PeftModel.from_pretrained(plain, adapter), Bases.load(adapter))


def test_merging_says_what_to_do_instead(model, adapter):
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(AdapterError, match="decompose"):
            merge()
    assert_carries(wrapped, Bases.load(adapter))


# -- the basis ---------------------------------------------------------------------------------------------------------


def test_caches_share_a_basis_until_it_changes(model, bases):
    attach(model, bases)
    basis, _ = found(model)
    assert found(model)[0] is basis
    placed = basis.placed(4, False, torch.float32, torch.device("cpu"))
    assert found(model)[0].placed(4, False, torch.float32, torch.device("cpu")) is placed

    parameter = attentions(model)[0].module.kv_lowrank.kv_lowrank_k_down["default"]
    with torch.no_grad():
        parameter.mul_(2)
    changed, _ = found(model)
    assert changed is not basis and found(model)[0] is changed
    assert torch.equal(changed.down, 2 * bases.of(0, "k").down)
    model.double()
    assert found(model)[0].down.dtype == torch.float64


def test_a_copied_model_has_its_own(model, bases):
    attach(model, bases)
    basis, _ = found(model)
    other = copy.deepcopy(model)
    copied = attentions(other)[0].module.kv_lowrank
    assert not copied._made, "the copy would keep the original's tensors alive"
    assert_carries(other, bases)
    assert found(other)[0] is not basis and found(model)[0] is basis
    assert found(other)[0].down.data_ptr() != basis.down.data_ptr()


def test_attaching_leaves_what_is_trained_alone(bases):
    model = model_of("llama").requires_grad_(True)
    model.lm_head.requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    attach(model, bases)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


# -- LoRA beside it ----------------------------------------------------------------------------------------------------


def lora_config():
    return peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights=False)


def lora_keys(folder):
    return {name.rsplit(".lora_", 1)[1] for name in load_file(folder / "adapter_model.safetensors")}


def test_around_a_lora(bases, model, adapter, tmp_path):
    torch.manual_seed(0)
    inner = peft.get_peft_model(model, lora_config(), adapter_name="style")
    expected = logits(inner)
    wrapped = peft.PeftModel.from_pretrained(inner, adapter, adapter_name="kv")
    assert_carries(wrapped, bases)
    assert torch.equal(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path / "out", selected_adapters=["kv"])
    names = load_file(tmp_path / "out" / "kv" / "adapter_model.safetensors").keys()
    assert names == load_file(adapter / "adapter_model.safetensors").keys()
    assert_same_bases(bases, Bases.load(tmp_path / "out" / "kv"))
    assert_carries(peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "out" / "kv"), bases)


def test_our_state_dict_is_ours_alone(bases, model):
    from hf_kvcache.adapters.lowrank import LowRankKVModel

    wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    attach(wrapped, bases, "kv")
    names = LowRankKVModel._get_adapter_state_dict(
        model=wrapped,
        config=wrapped.peft_config["kv"],
        adapter_name="kv",
        state_dict=wrapped.state_dict(),
        unwanted_adapter_names=[],
    )
    assert len(names) == 2 * 2 * 3 and all(".kv_lowrank.kv_lowrank_" in name for name in names)


def test_a_name_that_another_method_has_is_refused(model, adapter, bases):
    inner = peft.get_peft_model(model, lora_config())
    with pytest.raises(AdapterError, match="'default' of LORA"):
        peft.PeftModel.from_pretrained(inner, adapter)
    with pytest.raises(AdapterError, match="'default' already"):
        attach(inner, bases)
    assert inner.peft_config["default"].peft_type == "LORA"


def test_inside_a_lora(bases, model, adapter, tmp_path):
    inner = peft.PeftModel.from_pretrained(model, adapter, adapter_name="kv")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(inner, lora_config(), adapter_name="style")
    assert_carries(wrapped, bases)
    assert {n.rsplit(".", 2)[1] for n, p in wrapped.named_parameters() if p.requires_grad} == {"style"}
    wrapped.save_pretrained(tmp_path / "lora", selected_adapters=["style"])
    assert lora_keys(tmp_path / "lora" / "style") == {"A.weight", "B.weight"}


def test_attached_to_a_lora_in_training(bases, model, tmp_path):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    attach(wrapped, bases, "kv")
    assert_carries(wrapped, bases)
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == trained
    wrapped.set_adapter("style")
    assert_carries(wrapped, bases)

    optimiser = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    before = logits(wrapped)
    with torch.enable_grad():
        wrapped(prompt(1, 12), labels=prompt(1, 12)).loss.backward()
    optimiser.step()
    assert not torch.equal(logits(wrapped), before)
    assert_carries(wrapped, bases)

    wrapped.save_pretrained(tmp_path, selected_adapters=["style"])
    assert lora_keys(tmp_path / "style") == {"A.weight", "B.weight"}
    wrapped.merge_adapter(["style"])
    assert_carries(wrapped, bases)


def test_loras_of_transformers_beside_it(bases, model):
    attach(model, bases, "kv")
    peft_verbs.add_adapter(model, lora_config(), "style")
    assert_carries(model, bases)
    peft_verbs.disable_adapters(model)
    assert found(model) is None


# -- PEFT's registry ---------------------------------------------------------------------------------------------------


def test_the_method_is_registered_once():
    from hf_kvcache.adapters.lowrank import KV_LOWRANK, LowRankKVConfig, LowRankKVModel
    from hf_kvcache.adapters.peft_types import peft_type, register

    assert peft_type("KV_LOWRANK") is KV_LOWRANK is peft.PeftType.KV_LOWRANK is peft.PeftType("KV_LOWRANK")
    assert list(peft.PeftType).count(KV_LOWRANK) == 1
    assert json.dumps({"peft_type": KV_LOWRANK}) == '{"peft_type": "KV_LOWRANK"}'
    assert copy.deepcopy(KV_LOWRANK) is KV_LOWRANK
    register(KV_LOWRANK, LowRankKVConfig, LowRankKVModel)
    assert peft.get_peft_config({"peft_type": "KV_LOWRANK"}).cache_kwargs == {}


def test_layers_have_no_weight_to_stumble_over(model, bases):
    attach(model, bases)
    layer = attentions(model)[0].module.kv_lowrank
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")


def test_files_with_another_methods_weights_are_refused(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="lora_A"):
        Bases.load(adapter)


def test_attaching_is_quiet(model, bases):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(model, bases, "a")
        attach(model, bases, "b")


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_a_cache_finds_the_attached_bases(arch, rope):
    import hf_kvcache as kv

    bases = random_bases(model_of(arch), ranks=(12, 24), rope=rope, alternate=0)

    def scores(model, **more):
        cache = kv.LowRankCache(rope=rope, window=4, n_sink=0, **more)
        return torch.cat(generate(model, prompt(1, 60), cache, max_new_tokens=4).logits), cache.nbytes

    told, nbytes = scores(model_of(arch), bases=bases)
    model = attached(model_of(arch), bases)
    by_itself, nbytes_too = scores(model)
    assert torch.equal(by_itself, told) and nbytes_too == nbytes
    peft_verbs.disable_adapters(model)
    fitted, _ = scores(model)
    assert not torch.equal(fitted, told), "without an adapter the cache fits its own basis"
