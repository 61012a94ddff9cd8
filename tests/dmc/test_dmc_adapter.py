"""Decisions as a PEFT adapter: the same as in a retrofitted model, switched, refused, and beside LoRA."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from cases import SIZES, generate, new_model, padded, prompt
from safetensors.torch import load_file, save_file
from tiny_retrofits import CACHES, lengths, llama, retrofitted
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, Qwen3Config

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.adapters import AdapterError, DMCConfig, attach, attached_retrofit, save_adapter
from hf_kvcache.adapters.files import written
from hf_kvcache.compat import CACHE_NAME, cache_argument, given_cache

peft = pytest.importorskip("peft")
peft_verbs = pytest.importorskip("peft_verbs")
pytestmark = pytest.mark.filterwarnings("ignore")

FORMS = {
    "dmc-linear": dict(decision="linear", window=3),
    "dmc-rows": dict(decision="rows", window=0),
    "dms-linear": dict(method="dms", decision="linear", window=4),
    "dms-rows": dict(method="dms", decision="rows", window=4),
}
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "llama": lambda seed: llama(n_layers=2, dtype=torch.float32, seed=seed),
    "qwen3": lambda seed: new_model(Qwen3Config(**SIZES), dtype=torch.float32, seed=seed),
    "phi3": lambda seed: new_model(Phi3Config(**SIZES), dtype=torch.float32, seed=seed),
    "gemma3": lambda seed: new_model(Gemma3TextConfig(**SIZES, **SLIDING), dtype=torch.float32, seed=seed),
}


def base_of(arch="llama", seed=0):
    return FAMILIES[arch](seed)


def retrofit_of(arch="llama", form="dmc-linear", seed=0, **knobs):
    """A model with plain retrofits that decide at random."""
    return retrofitted(model=base_of(arch), seed=seed, **FORMS[form] | knobs)


def logits(model):
    with torch.no_grad():
        return model(prompt(2, 20), use_cache=False).logits


def child_of(model, layer_idx=0):
    return peft_free(model).model.layers[layer_idx].self_attn.kv_dmc


def peft_free(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def lora_config():
    return peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=2, init_lora_weights=False)


@pytest.fixture
def plain():
    return retrofit_of()


@pytest.fixture
def folder(plain, tmp_path):
    return save_adapter(plain, tmp_path / "adapter", target_ratio=4.0, achieved_ratio=3.5, tokens_seen=1000)


@pytest.fixture
def model():
    return base_of()


# -- the same as the retrofit that it was saved from -------------------------------------------------------------------


def by_attach(arch, folder):
    model = base_of(arch)
    attach(model, folder)
    return model


def by_load_adapter(arch, folder):
    model = base_of(arch)
    model.load_adapter(str(folder))
    return model


def by_peft_model(arch, folder):
    return peft.PeftModel.from_pretrained(base_of(arch), folder)


def by_meta(arch, folder):
    return peft.PeftModel.from_pretrained(base_of(arch), folder, low_cpu_mem_usage=True)


ROUTES = {"attach": by_attach, "load_adapter": by_load_adapter, "peft": by_peft_model, "meta": by_meta}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_loaded_as_it_was_saved(form, route, tmp_path):
    plain, vanilla = retrofit_of(form=form), logits(base_of())
    save_adapter(plain, tmp_path)
    model = ROUTES[route]("llama", tmp_path)
    assert torch.equal(logits(model), logits(plain)) and not torch.equal(logits(model), vanilla)
    ids, mask, _ = padded([40, 9])
    cache = CACHES[form[:3]]
    ours, theirs = (generate(m, ids, cache(), attention_mask=mask) for m in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(lengths(given_cache(ours)), lengths(given_cache(theirs)))
    assert lengths(given_cache(ours)).float().mean() < 40


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch != "llama"])
def test_every_family(arch, tmp_path):
    plain = retrofit_of(arch)
    save_adapter(plain, tmp_path)
    model = by_attach(arch, tmp_path)
    assert torch.equal(logits(model), logits(plain)) and not torch.equal(logits(model), logits(base_of(arch)))


def test_what_the_files_say(plain, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    settings = child_of(plain).settings
    assert config["peft_type"] == written("KV_DMC") and config["inference_mode"]
    assert {name: config[name] for name in settings.to_dict()} == settings.to_dict()
    sizes = dict(layers=[0, 1], num_kv_heads=2, hidden_size=32, digest=settings.digest, format_version=1)
    facts = dict(target_ratio=4.0, achieved_ratio=3.5, tokens_seen=1000, hf_kvcache_version=kv.__version__)
    assert config.items() >= (sizes | facts).items()
    assert config["fingerprint"]["num_hidden_layers"] == 2
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.kv_dmc.kv_dmc_{}"
    assert tensors.keys() == {name.format(i, part) for i in (0, 1) for part in ("decision", "importance")}
    # the weights themselves
    assert torch.equal(tensors[name.format(1, "decision")], child_of(plain, 1).decision)


def test_peft_saves_what_it_has_loaded(folder, tmp_path):
    model = by_peft_model("llama", folder)
    model.save_pretrained(tmp_path / "again")
    again = by_attach("llama", tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first.items() <= (second | {"base_model_name_or_path": first["base_model_name_or_path"]}).items()


def test_half_precision(folder, plain):
    model = base_of().bfloat16()
    attach(model, folder)
    expected = retrofit_of().bfloat16()
    assert torch.equal(logits(model), logits(expected)) and logits(model).dtype == torch.bfloat16


# -- trained -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_trained_by_peft_and_saved(method, model, tmp_path):
    wrapped = peft.get_peft_model(model, DMCConfig(method=method, window=4, offset=0.5))
    vanilla = logits(base_of())
    assert (logits(wrapped) - vanilla).abs().max() < 1e-5, "zeros keep everything"
    config = wrapped.peft_config["default"]
    assert (config.layers, config.num_kv_heads, config.hidden_size) == ([0, 1], 2, 32)
    assert (config.decision, config.scale, config.neuron) == ("linear", 20.0 if method == "dmc" else 100.0, -1)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == (4 if method == "dmc" else 2) and all(".kv_dmc." in name for name in trained)
    wrapped.train()
    optimiser = torch.optim.Adam(trained.values(), 0.05)
    for step in range(3):
        dmc.draw_noise(wrapped, 2, 20, seed=step)
        wrapped(prompt(2, 20), use_cache=False)
        optimiser.zero_grad()
        (-sum(child.call.p.mean() for child in dmc.retrofits(wrapped).values())).backward()
        optimiser.step()
    wrapped.eval()
    assert not torch.equal(logits(wrapped), vanilla)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(by_attach("llama", tmp_path)), logits(wrapped))
    again = peft.PeftModel.from_pretrained(base_of(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again), logits(wrapped))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained.keys()


def test_a_model_that_does_not_train_decides_hard(folder, model):
    attach(model, folder)
    assert not child_of(model).training
    training = base_of().train()
    attach(training, folder, trainable=True)
    assert child_of(training).training
    assert [name for name, p in training.named_parameters() if p.requires_grad and ".kv_dmc." not in name] == []
    with pytest.raises(RuntimeError, match="relaxed decisions"):
        training(prompt(), **cache_argument(kv.DMCCache()))


def test_the_teacher_is_the_base(folder, model):
    vanilla = logits(model)
    attach(model, folder)
    with dmc.compression_off(model):
        assert torch.equal(logits(model), vanilla)
    assert not torch.equal(logits(model), vanilla)


# -- several, on and off -----------------------------------------------------------------------------------------------


def test_several_adapters_take_turns(folder, tmp_path):
    other = retrofit_of(form="dms-rows", seed=3)
    save_adapter(other, tmp_path / "other")
    mine, theirs, vanilla = logits(retrofit_of()), logits(other), logits(base_of())
    model = peft.PeftModel.from_pretrained(base_of(), folder, adapter_name="a")
    model.load_adapter(str(tmp_path / "other"), "b")
    assert torch.equal(logits(model), mine)
    model.set_adapter("b")
    assert torch.equal(logits(model), theirs)
    with pytest.raises(ValueError, match="the cache is for DMC"):
        generate(model, prompt(), kv.DMCCache())
    with model.disable_adapter():
        assert torch.equal(logits(model), vanilla) and attached_retrofit(child_owner(model)) is None
        with pytest.raises(ValueError, match="makes none"):
            generate(model, prompt(), kv.DMSCache())
    assert torch.equal(logits(model), theirs)
    model.save_pretrained(tmp_path / "both")
    for name, expected in (("a", mine), ("b", theirs)):
        assert torch.equal(logits(by_attach("llama", tmp_path / "both" / name)), expected)
    model.delete_adapter("b")
    assert torch.equal(logits(model), mine)
    model.delete_adapter("a")
    assert torch.equal(logits(model.base_model.model), vanilla) and n_hooks(model) == 0 and not dmc.retrofits(model)
    model.load_adapter(str(folder), "a")
    model.set_adapter("a")
    assert torch.equal(logits(model), mine)


def child_owner(model):
    return peft_free(model).model.layers[0].self_attn


def test_transformers_own_methods(folder, model):
    vanilla = logits(model)
    model.load_adapter(str(folder), "a")
    mine = logits(model)
    peft_verbs.add_adapter(model, DMCConfig(method="dms", window=0), "b")
    peft_verbs.set_adapter(model, "b")
    assert (logits(model) - vanilla).abs().max() < 1e-5
    peft_verbs.set_adapter(model, "a")
    assert torch.equal(logits(model), mine)
    peft_verbs.disable_adapters(model)
    assert torch.equal(logits(model), vanilla)
    peft_verbs.enable_adapters(model)
    assert torch.equal(logits(model), mine)
    for name in ("a", "b"):
        peft_verbs.delete_adapter(model, name)
    assert torch.equal(logits(model), vanilla) and n_hooks(model) == 0


def test_rows_do_not_go_on_with_another_window(folder, tmp_path, model):
    other = retrofit_of(window=5, seed=1)
    save_adapter(other, tmp_path / "other")
    attach(model, folder, "a")
    attach(model, tmp_path / "other", "b")
    cache = kv.DMCCache()
    with torch.no_grad():
        model(prompt(), **cache_argument(cache))
        peft_verbs.set_adapter(model, "a")
        with pytest.raises(ValueError, match="window=5.*window=3"):
            model(prompt(1, 1), **cache_argument(cache))
        cache.reset()
        model(prompt(), **cache_argument(cache))


def test_generate_without_our_cache_says_so(folder, model):
    attach(model, folder)
    with pytest.raises(ValueError, match=f"{CACHE_NAME}=DMCCache"):
        generate(model, prompt())


def test_taken_off_and_never_merged(folder):
    model = by_peft_model("llama", folder)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="nothing to merge"):
            merge()
    bare = model.unload()
    assert not hasattr(child_owner(bare), "kv_dmc") and n_hooks(bare) == 0
    assert torch.equal(logits(bare), logits(base_of()))


def test_copies_and_pickles(folder, model):
    attach(model, folder)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for child in dmc.retrofits(model).values():
                child.kv_dmc_decision["default"].neg_()
            assert torch.equal(logits(other), expected) and not torch.equal(logits(model), expected)
            for child in dmc.retrofits(model).values():
                child.kv_dmc_decision["default"].neg_()


# -- beside LoRA -------------------------------------------------------------------------------------------------------


def lora_by_hand(plain, model):
    """The retrofit with the LoRA of `model` in its weights."""
    with torch.no_grad():
        for i, layer in enumerate(peft_free(model).model.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                projection = getattr(layer.self_attn, name)
                (key,) = projection.lora_A
                delta = projection.lora_B[key].weight @ projection.lora_A[key].weight * projection.scaling[key]
                getattr(plain.model.layers[i].self_attn, name).weight += delta
    return logits(plain)


@pytest.mark.parametrize("order", ["lora-first", "ours-first", "nested"])
@pytest.mark.parametrize("form", ["dmc-rows", "dms-linear", "dmc-linear"])
def test_beside_a_lora(form, order, model, tmp_path):
    plain = retrofit_of(form=form)
    save_adapter(plain, tmp_path / "kv")
    alone = logits(plain)
    torch.manual_seed(0)
    if order == "lora-first":
        wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
        attach(wrapped, tmp_path / "kv", "kv")
    elif order == "ours-first":
        attach(model, tmp_path / "kv", "kv")
        logits(model)
        wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    else:
        inner = peft.get_peft_model(model, lora_config(), adapter_name="style")
        wrapped = peft.PeftModel.from_pretrained(inner, tmp_path / "kv", adapter_name="kv")
    wrapped.eval()
    both = logits(wrapped)
    bare = wrapped.get_base_model() if order != "nested" else wrapped.get_base_model().get_base_model()
    expected = lora_by_hand(plain, bare)
    assert (both - expected).abs().max() < 2e-5 and (both - alone).abs().max() > 1e-2
    cache = CACHES[form[:3]]
    assert torch.equal(generate(wrapped, prompt(), cache()).sequences, generate(plain, prompt(), cache()).sequences)

    # each in files of its own
    wrapped.save_pretrained(tmp_path / "saved")
    kinds = {}
    for file in tmp_path.glob("saved/**/adapter_model.safetensors"):
        kinds[file.parent.name] = {"kv" if ".kv_dmc." in name else "style" for name in load_file(file)}
    assert kinds == {"kv": {"kv"}, "style": {"style"}}


def test_lora_merged_beneath_us(folder, model):
    wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    attach(wrapped, folder, "kv")
    both = logits(wrapped.eval())
    wrapped.merge_adapter(["style"])
    assert (logits(wrapped) - both).abs().max() < 2e-5
    wrapped.unmerge_adapter()
    wrapped.set_adapter("style")
    assert (logits(wrapped) - both).abs().max() < 2e-5, "ours is the one that was activated last among ours"


@pytest.fixture
def with_lora(tmp_path):
    """The folder of a retrofit and of the LoRA that was trained with it, and the logits of both."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(retrofit_of(), lora_config(), adapter_name="lora").eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    return save_adapter(wrapped, tmp_path / "adapter", lora="lora"), logits(wrapped)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_attach_brings_the_lora_that_was_trained_with_it(with_lora, model, is_wrapped):
    folder, expected = with_lora
    target = peft.get_peft_model(model, lora_config(), adapter_name="style") if is_wrapped else model
    if is_wrapped:
        for name, p in target.named_parameters():
            if "lora_B" in name:
                p.data.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hf_kvcache")
        attach(target, folder, "kv")
    assert {"kv", "kv-lora"} <= set(model.peft_config)
    assert torch.equal(logits(target.eval()), expected)
    with pytest.raises(AdapterError, match="'kv-lora' already"):
        attach(target, folder, "kv")


def test_lora_in_a_subfolder_of_a_subfolder(with_lora, model):
    folder, expected = with_lora
    attach(model, folder.parent, "kv", subfolder=folder.name)
    assert torch.equal(logits(model), expected)


def test_a_retrofit_whose_lora_is_missing_is_refused(with_lora, model):
    folder, _ = with_lora
    (folder / "lora" / "adapter_model.safetensors").unlink()
    before = logits(model)
    with pytest.raises(AdapterError, match="safetensors is missing"):
        attach(model, folder)
    assert n_hooks(model) == 0 and torch.equal(logits(model), before)


LORA_DAMAGE = {
    "another-name": (lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(32)}, "model.norm.weight"),
    "one-less": (lambda t: dict(list(t.items())[1:]), "1 tensors in all"),
    "nan": (lambda t: {name: x.fill_(float("nan")) for name, x in t.items()}, "NaN"),
    "shape": (lambda t: {name: x[:1].contiguous() for name, x in t.items()}, "shapes"),
}


@pytest.mark.parametrize("damage", LORA_DAMAGE)
def test_lora_of_strangers_is_refused_and_changes_nothing(damage, with_lora, model):
    folder, _ = with_lora
    change, message = LORA_DAMAGE[damage]
    file = folder / "lora" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=message):
        attach(model, folder)
    assert torch.equal(logits(model), before) and [name for name, _ in model.named_modules()] == modules


LORA_CONFIGS = {
    "other-weights": (dict(modules_to_save=["lm_head"]), "modules_to_save would change"),
    "biases": (dict(bias="all"), "bias would change"),
    "initialised-from-weights": (dict(init_lora_weights="pissa"), "init_lora_weights would change"),
    "nowhere": (dict(target_modules=["no_such_proj"]), "does not fit"),
    "no-lora": (dict(peft_type="IA3"), "LoRA was expected"),
}


@pytest.mark.parametrize("damage", LORA_CONFIGS)
def test_configs_of_lora_that_would_do_more_are_refused(damage, with_lora, model):
    folder, _ = with_lora
    fields, message = LORA_CONFIGS[damage]
    edit(folder / "lora", **fields)
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=message):
        attach(model, folder)
    assert torch.equal(logits(model), before) and [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_retrofit_that_is_refused_leaves_no_lora(with_lora):
    folder, _ = with_lora
    other = base_of(seed=1)
    before, modules = logits(other), [name for name, _ in other.named_modules()]
    with pytest.raises(AdapterError, match="weights"):
        attach(other, folder)
    assert torch.equal(logits(other), before)
    assert [name for name, _ in other.named_modules()] == modules and not other._hf_peft_config_loaded


def test_peft_says_that_there_is_lora(with_lora, model, monkeypatch):
    folder, expected = with_lora
    monkeypatch.setattr("hf_kvcache.warn._said", set())
    with pytest.warns(UserWarning, match="was trained with LoRA, which the model lacks"):
        wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name="kv")
    assert not torch.equal(logits(wrapped), expected)


def test_rows_that_were_trained_beside_a_lora(tmp_path):
    """What a trainer does: a plain retrofit, LoRA around it, and two folders."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(retrofit_of(), lora_config(), adapter_name="style").eval()
    expected = logits(wrapped)
    save_adapter(wrapped, tmp_path / "kv", achieved_ratio=2.0)
    wrapped.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base_of(), tmp_path / "style", adapter_name="style")
    attach(model, tmp_path / "kv", "kv")
    assert torch.equal(logits(model), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "missing"}))


DAMAGE = {
    "window-missing": (dict(window="missing"), "must say"),
    "window-negative": (dict(window=-1), "negative"),
    "window-huge": (dict(window=1 << 40), "nor above"),
    "window-other": (dict(window=4), "edited"),
    "neuron-other": (dict(neuron=0), "edited"),
    "offset-other": (dict(offset=4.0), "edited"),
    "offset-missing": (dict(offset="missing"), "must say"),
    "offset-infinite": (dict(offset=float("inf")), "positive"),
    "digest-missing": (dict(digest="missing"), "edited"),
    "borrowed": (dict(decision="borrowed"), "no adapter holds"),
    "heads": (dict(num_kv_heads=1), "says"),
    "hidden": (dict(hidden_size=64), "says"),
    "hidden-text": (dict(hidden_size="32"), "hidden_size"),
    "layers-fewer": (dict(layers=[0]), "not among"),
    "layers-more": (dict(layers=[0, 1, 2]), "missing"),
    "layers-unsorted": (dict(layers=[1, 0]), "layers"),
    "ratio": (dict(achieved_ratio=-1), "achieved_ratio"),
    "lora": (dict(lora="../lora"), "lora"),
    "version": (dict(format_version=2), "format_version 2"),
}


@pytest.mark.parametrize("route", ["attach", "peft"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_changed_configs_are_refused(damage, route, folder, model):
    fields, message = DAMAGE[damage]
    edit(folder, **fields)
    with pytest.raises(AdapterError, match=message):
        if route == "attach":
            attach(model, folder)
        else:
            peft.PeftModel.from_pretrained(model, folder)
    assert n_hooks(model) == 0 and not hasattr(child_owner(model), "kv_dmc")


def test_another_model_is_refused(folder, plain):
    three = llama(n_layers=3, dtype=torch.float32)
    others = ((base_of(seed=1), "weights"), (base_of("qwen3"), "does not fit"), (three, "layers"))
    for other, message in others:
        for load in (lambda m: attach(m, folder), lambda m: m.load_adapter(str(folder))):
            with pytest.raises(AdapterError, match=message):
                load(other)
        assert n_hooks(other) == 0
    for load in (lambda m: attach(m, folder, "b"), lambda m: peft.inject_adapter_in_model(DMCConfig(), m, "b")):
        with pytest.raises(AdapterError, match="retrofitted already"):
            load(plain)


def test_a_retrofit_on_top_is_refused(folder, model):
    attach(model, folder)
    with pytest.raises(AdapterError, match="retrofitted already"):
        dmc.retrofit(model, dmc.Settings())
    with pytest.raises(AdapterError, match="already"):
        attach(model, folder)
    with pytest.raises(AdapterError, match="PEFT adapters"):
        dmc.save(model, folder / "whole")


def test_damaged_weights_are_refused(folder, model, tmp_path):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("decision"))
    for changed, message in (
        ({k: t for k, t in tensors.items() if k != name}, "decision of layer 0 is missing"),
        (tensors | {name: tensors[name][:1].clone()}, "says"),
        (tensors | {name: tensors[name] * float("nan")}, "NaN"),
        (tensors | {name + "_more": tensors[name].clone()}, "no name"),
        (tensors | {name: tensors[name].double()}, "F64"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            attach(model, folder)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(AdapterError, match="damaged"):
        attach(model, folder)
    path.unlink()
    with pytest.raises(AdapterError, match="missing"):
        attach(model, folder)


def test_weights_that_transformers_did_not_find(folder, model):
    """It only warns; zeros would keep everything and say nothing."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if "layers.1." not in k}, path, {"format": "pt"})
    model.load_adapter(str(folder))
    with pytest.raises(AdapterError, match="weights were missing"):
        logits(model)


def test_configs_that_cannot_be(model):
    for fields, message in (
        (dict(num_kv_heads=1), "KV heads: the adapter is for 1"),
        (dict(layers=[0, 1, 2]), r"\[2\] beyond"),
        (dict(decision="borrowed"), "no adapter holds"),
        (dict(method="dmd"), "none of"),
        (dict(window=-2), "negative"),
        (dict(decision="rows", neuron=8), "the heads have 8 channels"),
        (dict(layers=[1]), "needs decisions of"),
    ):
        with pytest.raises(AdapterError, match=message):
            peft.get_peft_model(model, DMCConfig(**fields))
    assert n_hooks(model) == 0


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(AdapterError, match="does not have a Retrofit"):
        save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="no adapter holds"):
        save_adapter(retrofitted(n_layers=2), tmp_path)
    with pytest.raises(AdapterError, match="achieved_ratio"):
        save_adapter(retrofit_of(), tmp_path, achieved_ratio=0)
    partial = retrofit_of()
    del partial.model.layers[1].self_attn.kv_dmc
    with pytest.raises(AdapterError, match="does not have a Retrofit"):
        save_adapter(partial, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_base_is_found_by_what_the_adapter_says(folder, tmp_path):
    base_of().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "mine")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mine")), expected)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine")), expected)
