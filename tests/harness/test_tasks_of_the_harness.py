"""Tasks of each kind, from files, run end to end by the harness."""

import json
import sys

import pytest
import yaml
from harness_toys import LOADED, PROSE
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache.cli import main
from hf_kvcache.lm_eval import NAME, KVCacheLM

TASKS = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_next": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "toy_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "toy_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
CHOICES = [" the rain", " a", " harbour and the boats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Definitions of tasks, and their data beside them."""
    where = tmp_path_factory.mktemp("tasks")
    docs = [{"text": PROSE[i : i + 150 + i], "choices": CHOICES, "gold": i % 3} for i in (0, 50, 100)]
    (where / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    data = {"data_files": {"test": str(where / "docs.jsonl")}, "cache_dir": str(where / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    for name, task in TASKS.items():
        (where / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return where


def run(folder, model, **changed):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = dict(tasks=list(TASKS), task_manager=manager, batch_size=2, device="cpu", bootstrap_iters=0)
    found = simple_evaluate(model=model, model_args={"dtype": "float32"} | changed, log_samples=True, **options)
    scores = {
        (task, metric): value
        for task, row in found["results"].items()
        for metric, value in row.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return scores, found


def test_the_dense_cache_has_the_scores_of_the_harness(folder):
    where = LOADED["pretrained"]
    expected, _ = run(folder, "hf", pretrained=where)
    dense, found = run(folder, NAME, pretrained=where, cache="dense")
    assert {task for task, _ in expected} == set(TASKS) and dense == pytest.approx(expected, rel=1e-4)
    assert found["config"]["kv_cache"] == "dense" and found["config"]["kv_cache_bytes_per_token"] > 0
    # two bits tell everywhere; whether an answer is right need not change with them
    lossy, other = run(folder, NAME, pretrained=where, cache="quant:bits=2,window=0")
    for key in [("toy_next", "perplexity,none"), ("toy_perplexity", "word_perplexity,none")]:
        assert lossy[key] != pytest.approx(dense[key], rel=1e-3)
    said, other_said = (
        [sample["filtered_resps"] for sample in results["samples"]["toy_choice"]] for results in (found, other)
    )
    assert said != other_said
    assert other["config"]["kv_cache_bytes_per_token"] < 0.75 * found["config"]["kv_cache_bytes_per_token"]


# it reads all of the harness' own tasks to find ours
@pytest.mark.slow
def test_the_command_line_is_the_harness_own(folder, capsys, monkeypatch, tmp_path):
    # a cache of several arguments as JSON
    given = json.dumps({"pretrained": LOADED["pretrained"], "dtype": "float32", "cache": "quant:bits=4,window=16"})
    monkeypatch.setattr(sys, "argv", ["hf-kvcache"])
    arguments = ["lm-eval", "--model", "hf-kvcache", "--tasks", "toy_choice,toy_answer", "--limit", "2"]
    arguments += ["--include_path", str(folder), "--output_path", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--model_args", given]) == 0
    out = capsys.readouterr().out
    assert "hf-kvcache ({'pretrained'" in out and "toy_answer" in out and "|acc_norm" in out.replace(" ", "")
    (result,) = tmp_path.rglob("results*.json")
    assert json.loads(result.read_text())["config"]["kv_cache"] == "quant:bits=4,window=16"
    # a mistake ends it before a model is loaded
    assert main([*arguments, "--model_args", "pretrained=nowhere,cache=quant:bits=4,windows=16"]) == 2
    assert "no argument 'windows'" in capsys.readouterr().err


def test_chat_templates_are_the_harness_own(folder):
    """What the template says is read before the cache compresses."""
    model = AutoModelForCausalLM.from_pretrained(LOADED["pretrained"], dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(LOADED["pretrained"])
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = dict(tasks=["toy_choice", "toy_answer"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    said = []
    for lm in (HFLM(model, tokenizer=tokenizer), KVCacheLM(model, tokenizer=tokenizer, cache="dense")):
        found = simple_evaluate(model=lm, apply_chat_template=True, **options)["samples"]
        assert "[user] " in str(found["toy_choice"][0]["arguments"])
        scores = [score for sample in found["toy_choice"] for ((score, _),) in sample["resps"]]
        said.append((scores, [sample["resps"] for sample in found["toy_answer"]]))
    (expected, answers), (found, answered) = said
    assert found == pytest.approx(expected, abs=1e-4) and answered == answers
