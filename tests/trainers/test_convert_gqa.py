import json

import pytest
import torch
from cases import ARCHITECTURES, new_model, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import hf_kvcache as kv
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.compat import given_cache
from hf_kvcache.dmc.retrofitting import retrofit
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.trainers.convert_gqa import main, pool_heads


def with_equal_heads(model, group):
    """Make KV heads of a group identical (in place)."""
    for attention in attentions(model).values():
        for name in ("k_proj", "v_proj"):
            for t in getattr(attention.module, name).parameters():
                heads = t.data.unflatten(0, (-1, group, attention.head_dim))
                t.data.copy_(heads[:, :1].expand_as(heads).flatten(0, 2))
    return model


def heads(n_heads, n_kv_heads, bias=False):
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    cls = Qwen2Config if bias else LlamaConfig
    model = new_model(cls(num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, **sizes), "sdpa")
    if bias:
        for attention in attentions(model).values():
            for name in ("k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(attention.module, name).bias)
    return model


@pytest.mark.parametrize("n_heads, before, after", [(4, 4, 2), (4, 4, 1), (8, 4, 2), (8, 4, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_identical_heads_are_one(n_heads, before, after, bias):
    model = with_equal_heads(heads(n_heads, before, bias), before // after)
    ids = prompt(2, 20)
    expected, n_weights = model(ids).logits, model.num_parameters()
    pooled = pool_heads(model, after)
    torch.testing.assert_close(pooled(ids).logits, expected)
    for attention in attentions(pooled).values():
        assert attention.n_kv_heads == after and attention.n_heads == n_heads
        assert (attention.module.k_proj.bias is not None) == bias
    assert (pooled.num_parameters() < n_weights) == (after < before)
    # the cache has fewer heads, too
    assert given_cache(pooled(ids)).layers[0].keys.shape[1] == after


def test_others_are_averaged_and_the_model_stays_as_it_was():
    model = heads(8, 4)
    weight, module = model.model.layers[1].self_attn.k_proj.weight.clone(), model.model.layers[1].self_attn
    logits = model(prompt()).logits
    pooled = pool_heads(model, 2)
    neighbours = weight.unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
    torch.testing.assert_close(pooled.model.layers[1].self_attn.k_proj.weight, neighbours)
    assert pooled.config.num_key_value_heads == 2 and model.config.num_key_value_heads == 4
    assert module.num_key_value_groups == 2 and torch.equal(model(prompt()).logits, logits)


def test_saved_models_load(tmp_path):
    pooled = pool_heads(heads(4, 4, bias=True), 2)
    pooled.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_key_value_heads == 2
    torch.testing.assert_close(loaded(prompt()).logits, pooled(prompt()).logits)


def test_refusals():
    with pytest.raises(ValueError, match="layer 0 has 4 KV heads, which 3 do not divide"):
        pool_heads(heads(4, 4), 3)
    with pytest.raises(ValueError, match="which 8 do not divide"):
        pool_heads(heads(8, 4), 8)
    with pytest.raises(ValueError, match="which 0 do not divide"):
        pool_heads(heads(8, 4), 0)
    with pytest.raises(ValueError, match="no k_proj; only separate, plain linear"):
        pool_heads(new_model(ARCHITECTURES["phi3"](), "sdpa"), 1)
    with pytest.raises(ValueError, match="no attention modules"):
        pool_heads(torch.nn.Linear(2, 2), 1)
    model = heads(4, 4)
    retrofit(model, Settings())
    with pytest.raises(ValueError, match="layer 0 carries an adapter made for 4 KV heads"):
        pool_heads(model, 2)
    model = heads(4, 4)
    model.model.layers[1].self_attn.v_proj = torch.nn.utils.parametrizations.weight_norm(
        model.model.layers[1].self_attn.v_proj
    )
    with pytest.raises(ValueError, match="layer 1 has a ParametrizedLinear as v_proj"):
        pool_heads(model, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(kv.embedded_model())
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
    new_model(LlamaConfig(vocab_size=len(tokenizer), **sizes), "sdpa").save_pretrained(folder)
    return folder


def test_the_command_converts(small, tmp_path, capsys):
    main(["--model", str(small), "--kv-heads", "2", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == {"kv_heads": 2, "before": 4, "out": str(tmp_path)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_key_value_heads == 2
    assert AutoTokenizer.from_pretrained(tmp_path).bos_token_id == 0


@torch.enable_grad()
def test_the_command_trains(small, tmp_path):
    plain, trained = tmp_path / "plain", tmp_path / "trained"
    main(["--model", str(small), "--kv-heads", "2", "--out", str(plain)])
    further = ["--sequence", "64", "--batch-size", "2", "--save-steps", "0", "--lr", "1e-3"]
    main(["--model", str(small), "--kv-heads", "2", "--out", str(trained), "--uptrain-steps", "5", *further])
    report = json.loads((trained / "training.json").read_text())
    assert report["tokens"] == 5 * 2 * 64 and report["settings"]["method"] == "none"
    assert report["settings"]["ramp_steps"] == 4 and report["settings"]["zero_steps"] == 0
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (trained, plain))
    assert model.config.num_key_value_heads == 2
    assert not torch.equal(
        model.model.layers[0].self_attn.k_proj.weight, before.model.layers[0].self_attn.k_proj.weight
    )


def test_training_needs_steps(small, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(small), "--kv-heads", "2", "--out", str(tmp_path), "--lr", "1e-3"])
    assert "needs --uptrain-steps" in capsys.readouterr().err
