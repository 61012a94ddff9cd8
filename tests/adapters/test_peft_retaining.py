"""Retaining heads on a model: what they see while it runs, and as a PEFT adapter beside others."""

import copy
import gc
import io
import json
import weakref
from dataclasses import replace

import pytest
import torch
from cases import generate, prompt
from safetensors.torch import load_file
from test_peft_lowrank import lora_config, lora_keys
from tiny_bases import FAMILIES, model_of, random_bases
from tiny_heads import assert_same_heads, assert_scores, by_hand, heads_of, hidden_states, watch
from transformers import AutoModelForCausalLM

from hf_kvcache.adapters import AdapterError, RetainingHeads, attach, attached_basis, attached_heads
from hf_kvcache.adapters.base_weights import weights_digest
from hf_kvcache.adapters.modules import attentions, full_attentions

peft = pytest.importorskip("peft")
peft_verbs = pytest.importorskip("peft_verbs")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return model_of("llama")


@pytest.fixture
def heads(model):
    return heads_of(model)


@pytest.fixture
def adapter(heads, model, tmp_path):
    return heads.save(tmp_path / "adapter", model)


def logits(model):
    with torch.no_grad():
        return model(prompt(2, 12)).logits


def attached(model, heads, *args, **more):
    attach(model, heads, *args, **more)
    return model


def module_of(model, layer_idx=0):
    return attentions(model)[layer_idx].module


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- what they see -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_offers_features_and_scores(arch):
    heads = heads_of(model_of(arch))
    assert_scores(attached(model_of(arch), heads), heads)


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5])
@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_as_many_tokens_as_heads(arch, n_tokens):
    """Norms are called on `[B, S, H, D]` in some models and on `[B, H, S, D]` in others."""
    model = attached(model_of(arch), heads_of(model_of(arch)))
    seen, inputs = watch(model), hidden_states(model)
    with torch.no_grad():
        model(prompt(3, n_tokens))
    for i, (features, scores) in seen.items():
        assert torch.equal(features, by_hand(module_of(model, i), inputs[i], norm=True))
        assert scores.shape == (3, 2, n_tokens)


def test_a_fused_projection_with_norms():
    """No model of the table has both."""
    from hf_kvcache.adapters.capture import Capture
    from hf_kvcache.adapters.projections import sources

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = torch.nn.Linear(8, 32)
            self.q_norm, self.k_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)

        def forward(self, x):
            qkv = self.qkv_proj(x)
            self.q_norm(qkv[..., :16].unflatten(-1, (4, 4)))
            self.k_norm(qkv[..., 16:24].unflatten(-1, (2, 4)))
            return qkv

    module, x, seen = Fused(), torch.randn(2, 3, 8), []
    names = sources(module, "norm")
    capture = Capture(lambda: names)
    module.register_forward_hook(lambda *_: seen.extend(capture.parts()))
    capture.hang(module, names)
    qkv = module(x)
    q, k, v = seen
    assert torch.equal(q, module.q_norm(qkv[..., :16].unflatten(-1, (4, 4))).flatten(2))
    assert torch.equal(k, module.k_norm(qkv[..., 16:24].unflatten(-1, (2, 4))).flatten(2))
    assert torch.equal(v, qkv[..., 24:])
    capture.release()
    assert capture.parts() == [] and not module.qkv_proj._forward_hooks


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_features_before_the_norm_if_asked_for(arch):
    heads = heads_of(model_of(arch), feature_point="projection")
    assert_scores(attached(model_of(arch), heads), heads)


def test_long_texts_are_scored_in_blocks(model, heads, monkeypatch):
    from hf_kvcache.adapters import scoring

    monkeypatch.setattr(scoring, "_BLOCK", 3)
    assert_scores(attached(model, heads), heads)


def test_scores_belong_to_the_call(model, heads):
    """Chunks, decoding and other batches: always the tokens that were fed last."""
    seen = watch(attached(model, heads))
    generate(model, prompt(2, 9), max_new_tokens=3)
    assert seen[1][1].shape == (2, 2, 1)
    whole = {}
    for size in (9, 4):
        with torch.no_grad():
            model(prompt(1, size))
        whole[size] = seen[1][1]
    assert whole[9].shape[-1] == 9
    assert torch.allclose(whole[9][..., :4], whole[4], atol=1e-5)


def test_bfloat16_models_get_float32_scores(model, heads):
    seen = watch(attached(model.bfloat16(), heads.to(torch.bfloat16)))
    model(prompt())
    features, scores = seen[0]
    assert (features.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(scores, heads.to(torch.bfloat16).scores(0, features))


@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3"])
def test_features_have_their_graph_only_where_there_are_gradients(arch):
    model = attached(model_of(arch), heads_of(model_of(arch)))
    seen = watch(model, lambda child: child.features().requires_grad)
    model(prompt())
    assert not seen[0], "nothing of a frozen model has a graph"
    attentions(model)[0].module.requires_grad_(True)
    model(prompt())
    assert seen[0]
    with torch.no_grad():
        model(prompt())
    assert not seen[0]

    def without(child):
        with torch.no_grad():
            return child.features().requires_grad

    seen = watch(model, without)
    model(prompt())
    assert not seen[0]


# -- nothing stays -----------------------------------------------------------------------------------------------------


def spy(model, layer_idx=0):
    """Weak references to what the projections of a layer produce."""
    refs = []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(module_of(model, layer_idx), name).register_forward_hook(
            lambda m, a, out: refs.append(weakref.ref(out))
        )
    return refs


@pytest.mark.parametrize("grad", [False, True])
def test_no_activation_outlives_its_layer(model, heads, grad):
    attach(model, heads)
    seen = watch(model, lambda child: child.scores())
    refs, alive = spy(model), []
    module_of(model, 1).register_forward_pre_hook(lambda m, a: alive.extend(ref() is not None for ref in refs))
    with torch.set_grad_enabled(grad):
        model(prompt(1, 8), use_cache=False)
    assert len(refs) == len(alive) == 3 and not any(alive), "without the garbage collector"
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    assert len(seen) == 2


def test_nothing_is_captured_outside_a_call(model, heads):
    attach(model, heads)
    child = attached_heads(module_of(model))
    for when in ("before", "after"):
        with pytest.raises(RuntimeError, match="no features have been captured"):
            child.scores()
        module_of(model).q_proj(torch.zeros(1, 3, 32))
        assert child._capture._calls.now is None, when
        model(prompt())


def test_heads_of_a_repository_say_so_too(model, heads):
    """Its model carries them without an adapter."""
    from hf_kvcache.hub.heads_module import HeadsModule

    shapes = {part: tuple(t.shape) for part, t in zip(("fc1", "fc2"), heads.layers[0])}
    child = HeadsModule(shapes, module_of(model), heads.activation, heads.feature_point)
    with pytest.raises(RuntimeError, match="no features have been captured"):
        child.scores()


def test_a_call_that_fails_leaves_nothing(model, heads):
    attach(model, heads)
    child, refs = attached_heads(module_of(model)), spy(model)

    def fail(*args):
        raise ZeroDivisionError

    handle = module_of(model).o_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(prompt())
    with pytest.raises(RuntimeError, match="no features"):
        child.features()
    gc.collect()
    assert refs and not any(ref() is not None for ref in refs)
    handle.remove()
    assert_scores(model, heads)


def test_a_compiled_model_offers_them_too(model, heads):
    attach(model, heads)
    seen = watch(model, lambda child: child.scores())
    with torch.no_grad():
        model(prompt(1, 7), use_cache=False)
        expected = dict(seen)
        torch.compile(model, backend="aot_eager", fullgraph=True)(prompt(1, 7), use_cache=False)
    assert all(torch.allclose(seen[i], expected[i], atol=1e-5) for i in expected)
    assert attached_heads(module_of(model))._capture._calls.now is None


def test_scores_of_features_need_no_call(model, heads):
    attach(model, heads)
    features = torch.randn(1, 5, 128)
    assert torch.equal(attached_heads(module_of(model)).scores(features), heads.scores(0, features))


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma3"])
def test_copies_look_at_their_own_projections(arch, copied):
    model = model_of(arch)
    heads = heads_of(model)
    attach(model, heads)
    other = copied(model)
    assert n_hooks(other) == n_hooks(model)
    i = max(full_attentions(model))
    ours, theirs = (attached_heads(module_of(m, i)) for m in (model, other))
    assert ours is not theirs and ours._capture is not theirs._capture
    with torch.no_grad():
        for m in (other, model):
            for p in m.parameters():
                p.mul_(1.0 + 0.1 * (m is other))
    assert_scores(model, heads)
    assert_scores(other, replace(heads, layers={i: tuple(1.1 * t for t in own) for i, own in heads.layers.items()}))
    assert n_hooks(taken_off(other)) == 2 * len(attentions(other)), "those of this test"


def taken_off(model):
    from hf_kvcache.adapters.retaining_peft import RetainingHeadModel

    tuner = RetainingHeadModel.__new__(RetainingHeadModel)
    torch.nn.Module.__init__(tuner)
    tuner.model, tuner.peft_config = model, model.peft_config
    return tuner.unload()


# -- in and out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_loads_what_was_saved(arch, tmp_path):
    heads = heads_of(model_of(arch))
    heads.save(tmp_path, model_of(arch))
    expected = logits(model_of(arch))
    for load in (
        lambda: peft.PeftModel.from_pretrained(model_of(arch), tmp_path),
        lambda: peft.PeftModel.from_pretrained(model_of(arch), tmp_path, low_cpu_mem_usage=True),
        lambda: by_transformers(model_of(arch), tmp_path),
        lambda: attached(model_of(arch), heads),
        lambda: attached(model_of(arch), tmp_path),
    ):
        model = load()
        assert torch.equal(logits(model), expected), "the adapter alone must not change the model"
        assert not any(p.requires_grad for p in model.parameters())
        assert_same_heads(replace(heads, base_model=None), replace(RetainingHeads.of(model), base_model=None))
        assert_scores(model, heads)


def by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


def test_what_peft_saves_is_what_we_save(model, heads, tmp_path):
    heads.save(tmp_path / "ours", model)
    peft.PeftModel.from_pretrained(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert_same_heads(heads, RetainingHeads.load(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours.items() <= theirs.items()


def test_auto_class_finds_the_base_model(model, heads, tmp_path):
    model.save_pretrained(tmp_path / "base")
    replace(heads, base_model=str(tmp_path / "base")).save(tmp_path / "adapter")
    assert_scores(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), heads)
    assert_scores(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), heads)


def test_transformers_saves_what_was_attached(model, heads, tmp_path):
    attach(model, heads)
    if not peft_verbs.save_pretrained(model, tmp_path):
        RetainingHeads.of(model).save(tmp_path)
    assert_same_heads(replace(heads, base_model=""), replace(RetainingHeads.load(tmp_path), base_model=""))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_trained_from_nothing_by_peft(arch, tmp_path):
    from hf_kvcache.adapters import RetainingHeadConfig

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model_of(arch), RetainingHeadConfig(d_r=8, target="reconstruction", default_chunk=32))
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    layers = sorted(full_attentions(wrapped))
    assert len(trained) == 2 * len(layers) and all(".kv_retain." in name for name in trained)
    config = wrapped.peft_config["default"]
    assert (config.feature_dim, config.num_kv_heads, config.layers) == (128, 2, layers)
    assert config.activation == ("silu" if arch == "llama" else "gelu_pytorch_tanh")

    before = {name: p.detach().clone() for name, p in trained.items()}
    optimiser, losses = torch.optim.AdamW(trained.values(), 1e-2), []
    seen = watch(wrapped, lambda child: child.scores())
    for _ in range(5):
        wrapped(prompt(1, 12), use_cache=False)
        losses.append(sum((scores - 1).square().mean() for scores in seen.values()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())

    wrapped.save_pretrained(tmp_path)
    loaded = RetainingHeads.load(tmp_path)
    assert loaded.target == "reconstruction" and loaded.defaults == {"chunk": 32}
    loaded.check_model(model_of(arch))
    with pytest.raises(AdapterError, match="weights"):
        loaded.check_model(model_of(arch, seed=1))
    assert_same_heads(replace(loaded, base_model=None), replace(RetainingHeads.of(wrapped), base_model=None))
    again = peft.PeftModel.from_pretrained(model_of(arch), tmp_path, is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained.keys()


def test_attached_heads_can_be_trained(model, heads):
    attach(model, heads, trainable=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".kv_retain." in name for name in trained)
    seen = watch(model, lambda child: child.scores())
    model(prompt(), use_cache=False)
    seen[0].sum().backward()
    fc1, fc2 = attached_heads(module_of(model)).weights()
    assert fc1.grad.abs().sum() > 0 and fc2.grad.abs().sum() > 0
    assert heads.layers[0][0].grad is None and heads.layers[0][0].data_ptr() != fc1.data_ptr()


def test_a_config_that_does_not_fit_raises_and_touches_nothing(model, heads, adapter):
    from hf_kvcache.adapters import RetainingHeadConfig

    for config, message in (
        (RetainingHeadConfig(d_r=0), "d_r"),
        (RetainingHeadConfig(d_r=10**9), "d_r"),
        (RetainingHeadConfig(num_kv_heads=4), "KV heads"),
        (RetainingHeadConfig(feature_dim=64), "features"),
        (RetainingHeadConfig(layers=[0, 5]), r"\[5\] beyond"),
        (RetainingHeadConfig(feature_point="norm"), "no q_norm, k_norm"),
        (RetainingHeadConfig(activation="nope"), "activation"),
    ):
        with pytest.raises(AdapterError, match=message):
            peft.get_peft_model(model, config)
    other = model_of("llama", seed=1)
    for load in (lambda: peft.PeftModel.from_pretrained(other, adapter), lambda: attach(other, heads)):
        with pytest.raises(AdapterError, match="weights"):
            load()
    with pytest.raises(AdapterError, match="layers"):
        peft.get_peft_model(model_of("mistral-window8"), RetainingHeadConfig())
    for touched in (model, other):
        assert not any("kv_retain" in name for name, _ in touched.named_modules()) and n_hooks(touched) == 0


def test_other_folders_cannot_be_attached(model, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    for kind in ("LORA", None, ["RETAINING_HEAD"]):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
        with pytest.raises(AdapterError, match="what caches look for"):
            attach(model, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"format_version": 2}))
    with pytest.raises(AdapterError, match="format_version 2"):
        peft.PeftModel.from_pretrained(model, adapter)


# -- several, on and off -----------------------------------------------------------------------------------------------


def test_several_adapters_take_turns(model, heads, adapter, tmp_path):
    other = heads_of(model, d_r=5, seed=1)
    other.save(tmp_path / "other", model)
    wrapped = peft.PeftModel.from_pretrained(model, adapter, adapter_name="a")
    wrapped.load_adapter(str(tmp_path / "other"), "b")
    assert_scores(wrapped, heads)
    wrapped.set_adapter("b")
    assert_scores(wrapped, other)
    wrapped.set_adapter("a")
    with wrapped.disable_adapter():
        assert attached_heads(module_of(wrapped)) is None
        refs = spy(wrapped)
        wrapped(prompt())
        assert not any(ref() is not None for ref in refs)
        with pytest.raises(RuntimeError, match="no retaining heads: disabled"):
            module_of(wrapped).kv_retain.scores()
    assert_scores(wrapped, heads)

    wrapped.save_pretrained(tmp_path / "both")
    assert_same_heads(heads, RetainingHeads.load(tmp_path / "both" / "a"))
    assert_same_heads(other, RetainingHeads.load(tmp_path / "both" / "b"))
    assert RetainingHeads.of(wrapped, "b").d_r == 5

    wrapped.delete_adapter("a")
    assert_scores(wrapped, other)
    wrapped.delete_adapter("b")
    child = module_of(wrapped).kv_retain
    assert (
        attached_heads(module_of(wrapped)) is None and not child._capture._handles and not child._capture._watch.handles
    )
    with pytest.raises(RuntimeError, match="no retaining heads: no adapter"):
        child.scores()
    wrapped.load_adapter(str(adapter), "a")
    wrapped.set_adapter("a")
    assert_scores(wrapped, heads)


def test_adapters_may_look_at_different_points():
    model = model_of("qwen3")
    before, after = heads_of(model, feature_point="projection"), heads_of(model)
    attach(model, after, "after")
    attach(model, before, "before")
    assert_scores(model, before)
    peft_verbs.set_adapter(model, "after")
    assert_scores(model, after)
    peft_verbs.set_adapter(model, "before")
    assert_scores(model, before)
    assert not module_of(model).q_norm._forward_hooks


def test_transformers_own_methods_take_turns_too(model, heads):
    other = heads_of(model, d_r=5, seed=1)
    attach(model, heads, "a")
    attach(model, other, "b")
    assert_scores(model, other)
    peft_verbs.set_adapter(model, "a")
    assert_scores(model, heads)
    peft_verbs.disable_adapters(model)
    assert attached_heads(module_of(model)) is None
    peft_verbs.enable_adapters(model)
    assert_scores(model, heads)
    peft_verbs.delete_adapter(model, "a")
    assert_scores(model, other)
    with pytest.raises(AdapterError, match="'b' already"):
        attach(model, heads, "b")


def test_unload_takes_everything_off(model, adapter, heads):
    expected, keys = logits(model), model.state_dict().keys()
    plain = peft.PeftModel.from_pretrained(model, adapter).unload()
    assert plain.state_dict().keys() == keys and n_hooks(plain) == 0
    assert torch.equal(logits(plain), expected)
    assert_scores(peft.PeftModel.from_pretrained(plain, adapter), heads)


def test_merging_says_what_to_do_instead(model, adapter, heads):
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
        with pytest.raises(AdapterError, match="nothing to merge"):
            merge()
    assert_scores(wrapped, heads)


def test_attaching_leaves_what_is_trained_alone(heads):
    model = model_of("llama").requires_grad_(True)
    model.lm_head.requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    attach(model, heads)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_the_digest_ignores_heads(model, heads):
    plain = weights_digest(module_of(model))
    attach(model, heads)
    assert weights_digest(module_of(model)) == plain


# -- others beside them ------------------------------------------------------------------------------------------------


def assert_sees_lora(model, heads):
    """Features are those of the adapted projections, not of the original ones."""
    assert_scores(model, heads)
    seen, inputs = watch(model), hidden_states(model)
    model(prompt())
    q_proj = module_of(model).q_proj
    assert not torch.allclose(seen[0][0][..., :64], q_proj.base_layer(inputs[0]))
    assert not any(".q_proj.base_layer" in name for name, m in model.named_modules() if m._forward_hooks)


def test_attached_to_a_lora(model, heads, tmp_path):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    attach(wrapped, heads, "heads")
    assert_sees_lora(wrapped, heads)
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad} == trained
    wrapped.save_pretrained(tmp_path, selected_adapters=["style"])
    assert lora_keys(tmp_path / "style") == {"A.weight", "B.weight"}
    wrapped.merge_adapter(["style"])
    assert_scores(wrapped, heads)


def test_inside_a_lora(model, heads, adapter, tmp_path):
    inner = peft.PeftModel.from_pretrained(model, adapter, adapter_name="heads")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(inner, lora_config(), adapter_name="style")
    assert_sees_lora(wrapped, heads)
    assert {n.rsplit(".", 2)[1] for n, p in wrapped.named_parameters() if p.requires_grad} == {"style"}
    wrapped.save_pretrained(tmp_path, selected_adapters=["style"])
    assert lora_keys(tmp_path / "style") == {"A.weight", "B.weight"}


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_a_lora_that_leaves_again(model, heads, leave):
    attach(model, heads, "heads")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, lora_config(), adapter_name="style")
    assert_sees_lora(wrapped, heads)
    getattr(wrapped, leave)()
    assert not hasattr(module_of(model).q_proj, "base_layer")
    assert_scores(model, heads)


def test_loras_of_transformers_come_after(model, heads):
    attach(model, heads, "heads")
    torch.manual_seed(0)
    peft_verbs.add_adapter(model, lora_config(), "style")
    assert_sees_lora(model, heads)
    assert_sees_lora(copy.deepcopy(model), heads)


def test_around_a_lora(model, heads, adapter, tmp_path):
    torch.manual_seed(0)
    inner = peft.get_peft_model(model, lora_config(), adapter_name="style")
    wrapped = peft.PeftModel.from_pretrained(inner, adapter, adapter_name="heads")
    assert_sees_lora(wrapped, heads)
    wrapped.save_pretrained(tmp_path / "out", selected_adapters=["heads"])
    names = load_file(tmp_path / "out" / "heads" / "adapter_model.safetensors").keys()
    assert names == load_file(adapter / "adapter_model.safetensors").keys()
    assert_same_heads(heads, RetainingHeads.load(tmp_path / "out" / "heads"))


def test_low_rank_bases_beside_them(model, heads, tmp_path):
    bases = random_bases(model)
    attach(model, bases, "bases")
    attach(model, heads, "heads")
    assert attached_basis(module_of(model), "k") is not None
    assert_scores(model, heads)
    peft_verbs.set_adapter(model, "bases")
    assert attached_basis(module_of(model), "k") is not None
    assert_scores(model, heads)
    with pytest.raises(AdapterError, match="'bases' already"):
        attach(model, heads, "bases")


def test_a_name_that_another_method_has_is_refused(model, adapter, heads):
    inner = peft.get_peft_model(model, lora_config())
    with pytest.raises(AdapterError, match="'default' of LORA"):
        peft.PeftModel.from_pretrained(inner, adapter)
    with pytest.raises(AdapterError, match="'default' already"):
        attach(inner, heads)


def test_the_method_is_registered_once():
    from hf_kvcache.adapters.peft_types import peft_type, register
    from hf_kvcache.adapters.retaining_peft import RETAINING_HEAD, RetainingHeadConfig, RetainingHeadModel

    assert peft_type("RETAINING_HEAD") is RETAINING_HEAD is peft.PeftType.RETAINING_HEAD
    register(RETAINING_HEAD, RetainingHeadConfig, RetainingHeadModel)
    assert peft.get_peft_config({"peft_type": "RETAINING_HEAD"}).d_r == 256
