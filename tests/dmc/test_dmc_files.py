"""Retrofitted models as folders: nobody takes them for the base model, and they come back as they were."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from cases import SIZES, generate, new_model, padded, prompt
from safetensors.torch import load_file, save_file
from tiny_retrofits import CACHES, lengths, llama, retrofitted
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.adapters import AdapterError
from hf_kvcache.compat import CACHE_NAME, cache_argument, given_cache

FORMS = {
    "dmc-borrowed": dict(),
    "dmc-linear": dict(decision="linear", window=3),
    "dms-rows": dict(method="dms", decision="rows", window=4),
    "dms-borrowed": dict(method="dms", window=4),
}
OURS = ("DMCLlamaConfig", "DMCLlamaModel", "DMCLlamaForCausalLM")


def tiny(dtype=torch.float32, arch="llama", **knobs):
    """Two layers that decide at random."""
    if arch == "llama":
        return retrofitted(n_layers=2, dtype=dtype, **knobs)
    return retrofitted(model=new_model(Qwen3Config(**SIZES), dtype=dtype), **knobs)


def logits(model, ids=None, **more):
    with torch.no_grad():
        return model(prompt(2, 20) if ids is None else ids, **{"use_cache": False} | more).logits


def said(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **fields):
    """Change fields of `kv_dmc`; None takes one out."""
    config = said(folder)
    config["kv_dmc"] |= fields
    config["kv_dmc"] = {name: value for name, value in config["kv_dmc"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def modules(tmp_path_factory, monkeypatch):
    """Where transformers copies the code of folders."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def model():
    return tiny(decision="linear", window=3)


@pytest.fixture
def folder(model, tmp_path):
    dmc.save(model, tmp_path / "model", target_ratio=4.0, achieved_ratio=3.5, tokens_seen=1000)
    return tmp_path / "model"


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_comes_back_as_it_was(form, dtype, tmp_path):
    # through a file once before, because casting a model casts its angles, too
    dmc.save(tiny(**FORMS[form]).to(dtype), tmp_path / "first")
    model = dmc.load(tmp_path / "first")
    dmc.save(model, tmp_path / "second")
    again = dmc.load(tmp_path / "second", attn_implementation="sdpa")
    assert again.dtype == dtype and not again.training
    assert torch.equal(logits(again), logits(model))
    assert all(child.call.alpha[..., 1:].any() for child in dmc.retrofits(again).values())
    cache = CACHES[model.config.kv_dmc["method"]]
    assert torch.equal(*(generate(m, prompt(), cache()).sequences for m in (model, again)))


def test_float32_is_what_was_in_memory(model, folder):
    again = dmc.load(folder)
    assert torch.equal(logits(again), logits(model))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.model_type == "llama"


@pytest.mark.parametrize("form", ["dmc-linear", "dms-borrowed"])
def test_norms_of_queries_and_keys(form, tmp_path):
    model = tiny(arch="qwen3", **FORMS[form])
    dmc.save(model, tmp_path)
    again = dmc.load(tmp_path)
    assert type(again).__name__ == f"{form[:3].upper()}Qwen3ForCausalLM"
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generate(again, prompt()).sequences, generate(model, prompt(), CACHES[form[:3]]()).sequences)


def test_what_the_config_says(model, folder):
    config, settings = said(folder), next(iter(dmc.retrofits(model).values())).settings
    assert config["model_type"] == "dmc_llama" and config["architectures"] == [OURS[-1]]
    autos = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), OURS)
    assert config["auto_map"] == {auto: f"modeling_kv_dmc.{name}" for auto, name in autos}
    assert config["kv_dmc"] == settings.to_dict()
    facts = dict(target_ratio=4.0, achieved_ratio=3.5, tokens_seen=1000)
    assert config["kv_dmc_facts"] == facts | {"digest": settings.digest, "hf_kvcache_version": kv.__version__}
    assert (folder / "generation_config.json").exists()
    tensors = load_file(folder / "model.safetensors")
    assert sum(".kv_dmc." in name for name in tensors) == 4


@pytest.mark.parametrize("by", ["model", "save"])
def test_a_loaded_model_saves_itself_whole(by, folder, tmp_path):
    model = dmc.load(folder)
    if by == "model":
        model.save_pretrained(tmp_path / "again")
    else:
        dmc.save(model, tmp_path / "again", tokens_seen=2000)
    first, second = said(folder), said(tmp_path / "again")
    assert second["kv_dmc_facts"].pop("tokens_seen") == (1000 if by == "model" else 2000)
    assert first["kv_dmc_facts"].pop("tokens_seen") == 1000
    assert first == second
    code = "modeling_kv_dmc.py"
    assert (folder / code).read_text() == (tmp_path / "again" / code).read_text()
    assert torch.equal(logits(dmc.load(tmp_path / "again")), logits(model))


def test_the_body_alone(folder):
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(body).__name__ == "DMCLlamaModel" and len(dmc.retrofits(body)) == 2
    with torch.no_grad():
        ours, theirs = (m(prompt(), use_cache=False).last_hidden_state for m in (body, dmc.load(folder).model))
    assert torch.equal(ours, theirs)


def test_options_of_from_pretrained(folder):
    model, info = dmc.load(folder, dtype=torch.bfloat16, attn_implementation="hf_kvcache", output_loading_info=True)
    assert (
        model.dtype == torch.bfloat16 and model.config._attn_implementation == "hf_kvcache" and not info["error_msgs"]
    )
    assert all(p.dtype == torch.bfloat16 for child in dmc.retrofits(model).values() for p in child.parameters())


def test_a_tokenizer_goes_along(model, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    dmc.save(model, tmp_path, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
    assert AutoTokenizer.from_pretrained(tmp_path)("b")["input_ids"] == [1]


def test_copies_and_pickles(folder):
    model = dmc.load(folder)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.model.layers[0].self_attn.kv_dmc.decision.neg_()
        assert not torch.equal(logits(other), logits(model))
        with torch.no_grad():
            model.model.layers[0].self_attn.kv_dmc.decision.neg_()
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("arch", ["mixtral", "gemma3"])
def test_architectures_with_their_own_files(arch, tmp_path):
    """Names in files go by the model type; sliding layers decide nothing."""
    from transformers import Gemma3TextConfig, MixtralConfig

    layers = ["sliding_attention", "full_attention"]
    config = {
        "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=2),
        "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=layers),
    }[arch]()
    model = retrofitted(model=new_model(config, dtype=torch.float32), decision="linear")
    dmc.save(model, tmp_path)
    again = dmc.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    expected = generate(model, prompt(), kv.DMCCache(config=config))
    assert torch.equal(generate(again, prompt()).sequences, expected.sequences)


# -- without us, and with our code -------------------------------------------------------------------------------------

STRANGER = """
import json, shutil, sys
from transformers import AutoModelForCausalLM
import torch

def load(**more):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **more)
    except ValueError as error:
        return str(error)
    return type(model).__name__, float(model(torch.arange(9)[None], use_cache=False).logits.sum())

folder, said = sys.argv[1], {}
said["unasked"], said["refused"] = load(), load(trust_remote_code=False)
said["was_there"] = "hf_kvcache" in sys.modules
import hf_kvcache.dmc
said["imported"] = load()
config = json.load(open(folder + "/config.json"))
map = config.pop("auto_map")
json.dump(config, open(folder + "/config.json", "w"))
said["without_map"] = load(trust_remote_code=True)
json.dump(config | {"auto_map": map}, open(folder + "/config.json", "w"))
said["trusted"] = load(trust_remote_code=True)
print()  # the question that nobody has answered
print(json.dumps(said))
"""


@pytest.mark.slow
def test_nobody_takes_it_for_the_base_model(folder):
    """In a fresh process that has imported nothing, and that nobody can answer."""
    command = [sys.executable, "-c", STRANGER, str(folder)]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert not answers["was_there"]
    for who in ("unasked", "refused", "imported"):
        assert "trust_remote_code=True" in answers[who], answers
    assert "does not recognize this architecture" in answers["without_map"]
    name, total = answers["trusted"]
    # the other process may use another number of threads
    assert name == OURS[-1]
    assert total == pytest.approx(float(logits(dmc.load(folder), torch.arange(9)[None]).sum()), rel=1e-5)


def test_classes_have_names():
    from hf_kvcache.dmc import classes

    for name in OURS:
        assert getattr(classes, name).__name__ == name and getattr(classes, name) is getattr(classes, name)
    for name in ("DMCNothing", "LlamaForCausalLM", "DMCTrainer", "DMC"):
        with pytest.raises(AttributeError):
            getattr(classes, name)
    for method, base in (("dmd", "llama"), ("dmc", "nothing"), ("dmc", "vit"), ("dmc", "dmc_llama")):
        with pytest.raises(AdapterError):
            classes.classes_of(method, base)


# -- the cache that nobody has to ask for ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_generate_takes_our_cache(form, tmp_path):
    dmc.save(tiny(**FORMS[form]), tmp_path)
    model = dmc.load(tmp_path)
    ids, mask, _ = padded([60, 31, 8])
    cache = CACHES[form[:3]]
    unasked, asked = (generate(model, ids, c, attention_mask=mask) for c in (None, cache()))
    assert type(given_cache(unasked)) is cache
    assert torch.equal(unasked.sequences, asked.sequences)
    assert all(torch.equal(a, b) for a, b in zip(unasked.logits, asked.logits))
    rows = lengths(given_cache(unasked))
    assert torch.equal(rows, lengths(given_cache(asked)))
    assert given_cache(unasked).nbytes == given_cache(asked).nbytes
    # 75 tokens have been written
    assert rows.max() <= 75 and rows.float().mean() < 60 and (rows[:, 0] >= rows[:, 2]).any()


def test_padding_changes_no_row(model, folder):
    model = dmc.load(folder)
    ids, mask, rows = padded([40, 17])
    together = generate(model, ids, attention_mask=mask).sequences[:, -16:]
    for row, alone in enumerate(rows):
        assert torch.equal(generate(model, alone).sequences[0, -16:], together[row])


def test_a_forward_pass_takes_it_too(folder):
    model = dmc.load(folder)
    ids = prompt(2, 20)
    with torch.no_grad():
        first = model(ids[:, :13])
        cache = given_cache(first)
        assert type(cache) is kv.DMCCache and cache.get_seq_length() == 13
        second = model(ids[:, 13:], **cache_argument(cache))
        assert given_cache(second) is cache
        assert model(ids, use_cache=False).get(CACHE_NAME) is None
        by_hand = kv.DMCCache()
        assert given_cache(model(ids, None, None, by_hand)) is by_hand and by_hand.get_seq_length() == 20
    together = torch.cat([first.logits, second.logits], 1)
    assert (together - logits(model, ids)).abs().max() < 1e-5


def test_training_takes_none(folder):
    model = dmc.load(folder).train().requires_grad_()
    dmc.draw_noise(model, 2, 20, seed=0)
    out = model(prompt(2, 20), labels=prompt(2, 20))
    out.loss.backward()
    assert not isinstance(given_cache(out), kv.KVCache)
    assert all(child.decision.grad.abs().sum() > 0 for child in dmc.retrofits(model).values())


def test_other_caches_are_refused(folder):
    model = dmc.load(folder)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(prompt(), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="cannot go on"):
        model.generate(prompt(), max_new_tokens=3, **cache_argument(kv.KVCache()))
    with pytest.raises(ValueError, match="the cache is for DMS"):
        model.generate(prompt(), max_new_tokens=2, **cache_argument(kv.DMSCache()))
    with pytest.raises(ValueError, match="speculative"):
        model.generate(prompt(), max_new_tokens=8, prompt_lookup_num_tokens=2)
    expected = generate(model, prompt()).sequences
    assert torch.equal(generate(model, prompt(), use_cache=False).sequences, expected)
    assert torch.equal(generate(model, prompt(), cache_implementation="dynamic").sequences, expected)


# -- what is refused ---------------------------------------------------------------------------------------------------

DAMAGE = {
    "window-missing": (dict(window=None), "must say"),
    "window-negative": (dict(window=-1), "must not be negative"),
    "window-huge": (dict(window=1 << 40), "nor above"),
    "window-other": (dict(window=4), "edited"),
    "neuron-other": (dict(neuron=0), "edited"),
    "offset-other": (dict(offset=4.0), "edited"),
    "offset-zero": (dict(offset=0), "positive"),
    "scale-text": (dict(scale="20"), "positive"),
    "unknown": (dict(temperature=1.0), "nothing else"),
    "method": (dict(method="dms"), "cannot have settings for 'dms'"),
}


@pytest.mark.parametrize("by", ["load", "trust"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_changed_settings_are_refused(damage, by, folder):
    fields, message = DAMAGE[damage]
    edit(folder, **fields)
    with pytest.raises(AdapterError, match=message):
        if by == "load":
            dmc.load(folder)
        else:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_settings_of_other_shapes_are_refused(folder):
    for value in (None, [], "dmc", {}):
        (folder / "config.json").write_text(json.dumps(said(folder) | {"kv_dmc": value}))
        with pytest.raises(AdapterError, match="kv_dmc"):
            dmc.load(folder)


def test_weights_that_do_not_go_with_the_settings(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("kv_dmc.decision"))
    for changed, message in (
        ({k: t for k, t in tensors.items() if k != name}, "lacks 1 weights"),
        ({k: t for k, t in tensors.items() if "norm" not in k}, "lacks 5 weights"),
        (tensors | {name.replace("decision", "other"): tensors[name].clone()}, "in spite of its settings"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            dmc.load(folder)
    save_file(tensors | {name: tensors[name][:1].clone()}, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch|size"):
        dmc.load(folder)


def test_a_channel_that_there_is_not():
    for neuron in (8, -9):
        with pytest.raises(AdapterError, match=f"neuron={neuron}"):
            tiny(neuron=neuron)
    tiny(neuron=7), tiny(neuron=-8), tiny(neuron=8, decision="linear")


def test_a_vanilla_folder_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="no retrofitted model"):
        dmc.load(tmp_path)


# PEFT asks by a name that transformers has since changed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_what_cannot_be_saved(model, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(AdapterError, match="it is not retrofitted"):
        dmc.save(llama(), tmp_path)
    with pytest.raises(AdapterError, match="not what AutoModelForCausalLM"):
        dmc.save(model.model, tmp_path)
    with pytest.raises(AdapterError, match="JSON"):
        dmc.save(model, tmp_path, ratio=torch.ones(1))
    model.model.layers[1].self_attn.kv_dmc.settings = dmc.Settings(decision="linear", window=7)
    with pytest.raises(AdapterError, match="different settings"):
        dmc.save(model, tmp_path)
    del model.model.layers[1].self_attn.kv_dmc
    with pytest.raises(AdapterError, match=r"layers \[1\] of it are not"):
        dmc.save(model, tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    wrapped = peft.get_peft_model(tiny(), lora)
    for it in (wrapped, wrapped.get_base_model()):
        with pytest.raises(AdapterError, match="merge"):
            dmc.save(it, tmp_path)
    assert not any(tmp_path.iterdir())
    dmc.save(wrapped.merge_and_unload(), tmp_path)
