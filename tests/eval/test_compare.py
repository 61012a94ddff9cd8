"""The comparison on a random model: ratios, errors as rows, specifications, report and picture."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import ARCHITECTURES, new_model
from rich.console import Console
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache import registry
from hf_kvcache.eval.compare import Row, Settings, compare, n_stages, with_baseline
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.peers import is_installed
from hf_kvcache.eval.report import about, as_line, as_table, heading
from hf_kvcache.eval.specs import CacheSpec, SpecError, all_specs, default_specs, parse

SETTINGS = Settings(context=160, n_new=3, rounds=2, eval_context=512, n_windows=2, n_next=32, n_prompts=1)
TEXTS = ["dense", "quant:bits=2,window=0", "streaming:ratio=0.25", "keydiff:ratio=0.5+quant:bits=8,window=4"]


class Letters:
    """A tokenizer with one token per character and no ledger."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(letter) % 120 for letter in text]}

    def get_vocab(self):
        return {}


def broken(config):
    raise RuntimeError("out of luck\nsecond line")


@pytest.fixture(scope="module")
def result():
    """Rows by name, and the stages that were announced."""
    model = new_model(ARCHITECTURES["llama"]())
    specs = with_baseline([*map(parse, TEXTS), CacheSpec("broken", broken)])
    stages, measured = [], []
    text = "".join(chr(97 + i * i % 26) for i in range(1500))
    rows = compare(
        model,
        Letters(),
        text,
        specs,
        SETTINGS,
        stages.append,
        lambda row, is_final: measured.append((replace(row), is_final)),
    )
    assert len(stages) == n_stages(len(specs), SETTINGS)
    return model, {row.cache: row for row in rows}, measured


def test_baseline_comes_first_and_is_the_unit(result):
    rows = result[1]
    assert next(iter(rows)) == "dynamic"
    assert rows["dynamic"].bytes_ratio == rows["dynamic"].speedup == 1
    # 2 layers of keys and values, 163 tokens, 2 heads, 16 channels, float32
    assert rows["dynamic"].nbytes == 2 * 2 * (SETTINGS.context + SETTINGS.n_new) * 2 * 16 * 4


def test_lossless_cache_equals_the_baseline(result):
    dynamic, dense = result[1]["dynamic"], result[1]["dense"]
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert dense.perplexity == pytest.approx(dynamic.perplexity, rel=1e-4)
    assert dense.retrieval == dynamic.retrieval
    assert 1 <= dense.bytes_ratio < 1.13
    assert dense.nbytes_prompt <= dynamic.nbytes


def test_lossy_caches_save_bytes_and_cost_fidelity(result):
    for text in TEXTS[1:]:
        row = result[1][text]
        assert row.error is None
        assert row.bytes_ratio < 0.6, text
        assert row.kl > 1e-5, text
        assert row.prefill_s > 0 and row.tokens_per_s > 0 and row.speedup > 0


def test_a_row_is_handed_over_when_it_has_been_measured(result):
    """Bytes and speed after every round, everything when it has been scored, one cache after the other."""
    _, rows, measured = result
    assert [row.cache for row, _ in measured] == list(rows) * (SETTINGS.rounds + 1)
    halves, wholes = measured[: -len(rows)], measured[-len(rows) :]
    assert not any(is_final for _, is_final in halves) and all(is_final for _, is_final in wholes)
    assert [row for row, _ in wholes] == list(rows.values())
    for row, _ in halves:
        assert row.error or (row.bytes_ratio and row.speedup and row.kl is None)


def test_failure_is_a_row(result):
    row = result[1]["broken"]
    assert row.error == "RuntimeError: out of luck\nsecond line"
    assert row.nbytes is row.kl is row.retrieval is None


def test_a_prompt_that_is_read_twice_is_compared(result):
    specs = with_baseline([parse("kvzip:ratio=0.25+dense:window=4")])
    _, row = compare(result[0], Letters(), "".join(chr(97 + i * i % 26) for i in range(1500)), specs, SETTINGS)
    assert row.error is None and row.bytes_ratio < 0.7 and row.kl > 1e-5
    assert row.retrieval is not None and row.prefill_s > 0


def test_peers_run_on_the_attention_they_have_without_us(result):
    model = result[0]
    seen = {}

    def spy(name, make):
        def factory(config, **knobs):
            seen[name] = model.config._attn_implementation
            return make(config)

        return factory

    specs = [parse("dynamic"), CacheSpec("ours", spy("ours", lambda config: kv.KVCache()))]
    compare(model, Letters(), "a" * 600, specs, SETTINGS)
    assert seen == {"ours": "hf_kvcache"}
    assert specs[0].is_peer and not specs[1].is_peer


def test_table_and_json_show_every_row(result):
    model, rows, _ = result
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(as_table(list(rows.values()), SETTINGS, "title"))
    text = console.export_text()
    assert all(name in text for name in rows)
    assert "RuntimeError: out of luck" in text and "second line" not in text
    lines = [heading(60), *(as_line(row, 60) for row in rows.values())]
    assert "perplexity" in lines[0] and all(line.startswith(name) for line, name in zip(lines[1:], rows))
    assert lines[-1].endswith("\n  RuntimeError: out of luck") and len({len(line) for line in lines[:4]}) == 1
    data = json.loads(json.dumps(about(SETTINGS, model, "tiny")))
    assert data["settings"]["context"] == 160 and data["dtype"] == "float32" and data["versions"]["torch"]


def test_picture_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib")
    from hf_kvcache.eval.picture import family, save_picture

    save_picture(list(result[1].values()), tmp_path / "out.png", "title")
    assert (tmp_path / "out.png").stat().st_size > 20_000
    families = [family(row) for row in result[1].values() if not row.error]
    assert families == ["transformers' own", "saves nothing", "saves bits", "saves tokens", "saves tokens and bits"]


def test_every_kind_has_a_colour_of_its_own():
    pytest.importorskip("matplotlib")
    from hf_kvcache.eval.picture import COLOURS, family

    kinds = {spec.text: family(Row(spec.text, spec.is_peer)) for spec in all_specs(retrofit="dms")}
    assert kinds["sparse:sparsity=0.7,bits=4"] == "saves channels and bits"
    assert kinds["sparse:sparsity=0.7"] == "saves channels" and kinds["dms+quant:bits=4"] == "saves tokens and bits"
    assert kinds["keydiff:ratio=0.25+sparse:sparsity=0.5,bits=8"] == "saves tokens, channels and bits"
    assert set(kinds.values()) <= set(COLOURS) and len(set(COLOURS.values())) == len(COLOURS) == 10


def test_nothing_is_drawn_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_kvcache.eval.picture import save_picture

    save_picture([Row("dynamic", True, error="no")], tmp_path / "out.png", "title")
    assert not (tmp_path / "out.png").exists()


# -- specifications ------------------------------------------------------------------------------------------------


def test_spec_builds_what_it_says():
    cache = parse("quant:bits=2,rotate=true,edge_layers=1").build()
    assert isinstance(cache, kv.QuantCache)
    assert (cache.codec[0].bits, cache.codec[0].rotate, cache.edge_layers) == (2, True, 1)


def test_policy_composes_with_cache():
    cache = parse("keydiff:ratio=0.5,n_sink=2 + quant:bits=8").build()
    assert isinstance(cache, kv.QuantCache) and isinstance(cache.policy, kv.KeyDiff)
    assert (cache.policy.ratio, cache.policy.n_sink, cache.codec[0].axis) == (0.5, 2, "token")


def test_policy_alone_is_dense():
    cache = parse("streaming:budget=100").build()
    assert isinstance(cache.policy, kv.Streaming) and cache.codec is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("quantum", "no cache is called 'quantum'; there are dynamic, quanto, hqq, fp8, dense, quant"),
        ("quant:bit=4", "quant has no argument 'bit'; it takes bits, window, rotate"),
        ("quant:4", "'4' is not of the form argument=value"),
        ("quant:bits=5", "bits=5 is not one of"),
        ("quant:bits=four", "quant: bits=four is not a whole number"),
        ("quant:window=1.5", "quant: window=1.5 is not a whole number"),
        ("quant:window=-1", "quant: window=-1 is not a number from 0 up"),
        ("quant:rotate=2", "quant: rotate=2 is not true or false"),
        ("dense:max_length=nan", "dense: max_length=nan is not a finite number"),
        ("keydiff:ratio=nan", "keydiff: ratio=nan is not a finite number"),
        ("keydiff:ratio=-0.5", "ratio=-0.5 is not in (0, 1]"),
        ("keydiff:ratio=half", "keydiff: ratio=half is not a number or none"),
        ("quanto:bits=-4", "quanto: bits=-4 is not a number from 0 up"),
        ("quant:edge_codec=4", "quant: edge_codec=4 is not none"),
        ("keydiff", "give either budget="),
        ("keydiff:ratio=0.5+quant:key_axis=channel", "drops single tokens"),
        ("keydiff:ratio=0.5+streaming:ratio=0.5", "joins one eviction policy and one cache"),
        ("keydiff:ratio=0.5+quanto", "joins one eviction policy and one cache"),
        ("quant:policy=keydiff", "quant has no argument 'policy'"),
        ("", "no cache is called ''"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(SpecError) as caught:
        parse(text).check()
    assert message in str(caught.value)


def test_default_is_ten_that_differ():
    texts = [spec.text for spec in default_specs()]
    assert texts[0] == "dynamic" and len(set(texts)) == 10 - (not is_installed("quanto") and not is_installed("hqq"))
    assert set(texts) <= {spec.text for spec in all_specs()}
    assert [spec.text for spec in default_specs("dms")][-3:] == ["dms", "dms+quant:bits=8", "dms+quant:bits=4"]


def test_all_has_every_method_and_the_baseline():
    texts = [spec.text for spec in all_specs()]
    assert texts[0] == "dynamic"
    for method in registry.METHODS:
        # of the eviction family some are left to the benchmark of that family
        is_shown = method.compared != ()
        assert any(text.split(":")[0] == method.name for text in texts) == is_shown, method.name
        assert is_shown or method.axis == "tokens", method.name
    # a model without retaining heads is not compared by them
    assert not any(spec.text.startswith("locret") for spec in all_specs(carries_heads=False))


def test_a_new_method_needs_only_its_registry_line(monkeypatch):
    new = registry.Method("newest", "hf_kvcache.policies.streaming:Streaming", "tokens", "The newest tokens")
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, new))
    assert all_specs()[-1].text == "newest:ratio=0.25"
    assert isinstance(parse("newest:budget=64").build().policy, kv.Streaming)


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_count_a_storage_once_and_look_inside_wrappers():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    layer = cache.layers[0]
    plain = 2 * 2 * 10 * 4 * 4
    assert cache_nbytes(cache) == plain
    layer.again = layer.keys[:, :, :3]
    assert cache_nbytes(cache) == plain
    layer.meta = ({"scale": torch.zeros(5, dtype=torch.float16)}, [torch.zeros(3)])
    assert cache_nbytes(cache) == plain + 10 + 12
    layer.wrapped = TwoTensor(torch.zeros(2), torch.zeros(2))
    assert cache_nbytes(cache) == plain + 22 + 16


def test_bytes_of_ours_are_its_own_count():
    cache = kv.QuantCache(4, window=0)
    cache.update(torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16), 0)
    assert cache_nbytes(cache) == cache.nbytes > 0


@pytest.mark.parametrize("name", ["quanto", "hqq"])
def test_quantised_peers_are_smaller(name):
    from hf_kvcache.eval.peers import PEERS

    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    config = ARCHITECTURES["llama"]()
    make = partial(PEERS[name], config)
    rows = torch.randn(1, 2, 256, 16)
    sizes = {}
    for bits in (4, 2):
        try:
            cache = make(bits=bits)
        except RuntimeError as error:
            pytest.skip(str(error))
        cache.update(rows, rows, 0)
        sizes[bits] = cache_nbytes(cache)
    dense = 2 * rows.numel() * 4
    assert 0.05 * dense < sizes[2] < sizes[4] < 0.3 * dense


@pytest.mark.parametrize("name", ["hqq", "fp8"])
def test_peers_take_any_length(name):
    """An odd number of heads and rows leaves an odd number of groups, which hqq packs along one axis only."""
    from transformers import LlamaConfig

    from hf_kvcache.eval.peers import PEERS

    if not is_installed(name):
        pytest.skip(f"{name} is not there")
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=192)
    cache, rows = PEERS[name](config), torch.randn(1, 3, 133, 64)
    cache.update(rows, rows, 0)
    assert cache_nbytes(cache) < 0.26 * 2 * rows.nbytes
    keys, _ = cache.update(rows[:, :, :1], rows[:, :, :1], 0)
    assert (keys[:, :, :133] - rows).pow(2).mean() < 0.01


def test_fp8_says_what_it_needs(monkeypatch):
    from hf_kvcache.eval import peers

    monkeypatch.setattr(peers, "is_installed", lambda name: False)
    with pytest.raises(RuntimeError, match="no QuantizedCache in fp8: it came with 5.21"):
        peers.fp8(None)
