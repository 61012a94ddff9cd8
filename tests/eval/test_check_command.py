"""`hf-kvcache check` from end to end, on the embedded model with short contexts."""

import json
import math

import pytest
import torch

import hf_kvcache as kv
from hf_kvcache import presets
from hf_kvcache.cache_config import KVCacheConfig
from hf_kvcache.cli import main
from hf_kvcache.eval import retrieval
from hf_kvcache.eval.checking import DenseIsNotFinite, deviation

FAST = ["--context", "256", "--dtype", "fp32", "--device", "cpu"]


def check(capsys, *args):
    """Exit code, what was printed as JSON, its checks by name, and standard error."""
    code = main(["check", *FAST, "--json", *args])
    out, err = capsys.readouterr()
    said = json.loads(out) if out else {}
    return code, said, {one["name"]: one for one in said.get("checks", ())}, err


def test_a_harmless_cache_passes(capsys):
    code, said, checks, _ = check(capsys, "--cache", "quant:bits=8", "--pieces", "3", "--needles", "26")
    assert code == 0 and said["verdict"] == "passed" and said["blame"] == [] and said["not_blamed"] is None
    assert (said["cache"], said["model"], said["dtype"]) == ("quant:bits=8", "the embedded model", "float32")
    assert [said[name] for name in ("context", "pieces", "needles", "seed")] == [256, 3, 26, 0]
    assert list(checks) == ["numbers", "prose", "needles", "bytes"]
    assert (
        checks["prose"]["estimate"]["n"] == 3 and checks["prose"]["estimate"]["high"] < checks["prose"]["limit"] == 0.05
    )
    assert checks["needles"]["measured"]["found"] >= 51 <= checks["needles"]["measured"]["dense_found"]
    assert checks["bytes"]["verdict"] is None and checks["bytes"]["measured"]["ratio"] < 0.6


def test_what_is_evicted_is_missed_and_somebody_to_blame(capsys):
    few = "--context", "512", "--pieces", "2", "--needles", "8"
    code, said, checks, _ = check(capsys, "--cache", "streaming:ratio=0.02", "--max-kl", "9", *few)
    assert code == 1 and said["verdict"] == checks["needles"]["verdict"] == "failed"
    assert checks["needles"]["measured"]["dense_found"] == 16 and checks["needles"]["measured"]["kl"] > 1
    first, *others = said["blame"]
    assert first["side"] == "tokens" and first["kl_without"] < first["kl"] / 2
    assert all(first["kl_without"] <= other["kl_without"] for other in others)


def test_what_the_model_says_by_itself(capsys):
    few = "--pieces", "2", "--needles", "0"
    code, _, checks, _ = check(capsys, "--cache", "dense", *few, "--decode", "16", "--max-repeats", "80")
    assert code == 0 and checks["decode"]["verdict"] == "passed" and checks["decode"]["measured"]["agreed"] == 16
    assert checks["decode"]["measured"]["repeats"] == checks["decode"]["measured"]["dense_repeats"]


def test_a_tight_limit_names_layers_and_sides(capsys):
    limits = ["--max-kl", "0.0001", "--max-bytes", "0.1", "--needles", "0", "--pieces", "2"]
    code = main(["check", *FAST, "--cache", "quant:bits=2", *limits])
    out = capsys.readouterr().out
    assert code == 1 and out.rstrip().endswith("failed")
    assert "failed     prose" in out and "failed     bytes" in out and "needles  " not in out
    blamed = [line for line in out.splitlines() if " blame " in line]
    assert len(blamed) == 6 and all(" keys: KL " in line or " values: KL " in line for line in blamed)


def test_transformers_own_caches_are_not_taken_apart(capsys):
    pytest.importorskip("hqq")
    code, said, _, _ = check(capsys, "--cache", "hqq:bits=2", "--pieces", "2", "--needles", "0", "--max-kl", "0.0001")
    assert code == 1 and said["blame"] == [] and "caches of this package" in said["not_blamed"]


def test_few_texts_decide_nothing(capsys):
    code, said, checks, _ = check(capsys, "--cache", "dense", "--pieces", "2", "--needles", "2")
    assert code == 1 and said["verdict"] == checks["needles"]["verdict"] == "undecided"
    assert "--needles 26" in checks["needles"]["todo"] and checks["prose"]["verdict"] == "passed"


def test_a_model_that_cannot_do_it_is_named(capsys, monkeypatch):
    """Needles in prose, as other tokenizers get them, are too much for the embedded model."""

    def no_ledger(tokenizer):
        raise ValueError

    monkeypatch.setattr(retrieval.Ledger, "from_tokenizer", no_ledger)
    code, _, checks, _ = check(capsys, "--cache", "dense", "--context", "512", "--pieces", "2", "--needles", "2")
    assert code == 1 and checks["needles"]["says"].startswith("your dense model finds 0 of 4: this says nothing")


def test_rows_that_are_no_numbers_fail(capsys, monkeypatch):
    update = presets.DenseCache.update
    monkeypatch.setattr(
        presets.DenseCache, "update", lambda self, k, v, *args, **more: update(self, k * math.nan, v, *args, **more)
    )
    code, said, checks, _ = check(capsys, "--cache", "dense", "--pieces", "2", "--needles", "1")
    assert code == 1 and checks["numbers"]["verdict"] == "failed" and "on 3 of 3 texts" in checks["numbers"]["says"]
    assert said["blame"] == [] and checks["prose"]["estimate"] is None


def test_a_cache_of_a_file(capsys, tmp_path):
    """One that was tuned on the texts that it is checked on is said to be."""
    from hf_kvcache.commands.tune import digest_of
    from hf_kvcache.models import embedded_prose

    digest = digest_of([embedded_prose().read_text(encoding="utf-8")])
    path = KVCacheConfig.from_cache(kv.QuantCache(8), texts={"digest": digest}).save(tmp_path)
    few = "--pieces", "2", "--needles", "0"
    code, said, _, err = check(capsys, "--config", str(path), *few)
    assert code == 0 and said["cache"].startswith(f"config:{path}@") and "was tuned on these texts" in err
    assert "was tuned" not in check(capsys, "--cache", "quant:bits=8", *few)[3]


@pytest.mark.parametrize("cache", ["dynamic", "kvzip:ratio=0.5", "locret:ratio=0.5", "keydiff:ratio=0.5+quant:bits=8"])
def test_any_cache_is_checked(capsys, cache):
    """transformers' own, one that reads twice, one of trained heads, and two methods in one."""
    if cache.startswith("locret"):
        pytest.importorskip("peft")
    code, said, checks, _ = check(capsys, "--cache", cache, "--pieces", "2", "--needles", "0", "--max-kl", "9")
    assert code == 0 and checks["prose"]["verdict"] == "passed" and said["cache"] == cache
    assert checks["bytes"]["measured"]["ratio"] <= 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cache", "dense", "--pieces", "999"], "--pieces: there are"),
        (["--cache", "dense", "--context", "99999"], "this model reads at most"),
        (["--cache", "dmc"], "retrofitted model"),
        (["--config", "no/such/file.json"], "no/such/file.json"),
    ],
    ids=["pieces", "context", "dmc", "config"],
)
def test_mistakes_end_with_two_and_a_sentence(capsys, args, message):
    code, said, _, err = check(capsys, "--pieces", "1", "--needles", "1", *args)
    assert code == 2 and not said and message in err.splitlines()[-1]


def test_how_far_logits_are():
    expected = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    targets = torch.tensor([1, 0])
    same = deviation(expected, expected.clone(), targets)
    assert same.kl == 0 and same.same == 1 and same.is_finite and same.loss == same.dense_loss
    other = deviation(expected, expected.flip(0), targets)
    assert other.kl > 0 and other.same == 0 and other.loss > other.dense_loss
    for wrong in (math.nan, math.inf, -math.inf):
        found = expected.clone()
        found[0, 0] = wrong
        assert deviation(expected, found, targets) == deviation(expected, found, targets)
        assert not deviation(expected, found, targets).is_finite and deviation(expected, found, targets).kl is None
    with pytest.raises(DenseIsNotFinite, match="--dtype"):
        deviation(found * math.nan, expected, targets)
