"""`hf-kvcache eval` from end to end, on the embedded model with short texts and a toy of a task."""

import json
from dataclasses import replace

import pytest
from toy_tasks import COLOURS

from hf_kvcache.cli import main
from hf_kvcache.commands.eval import SETTINGS as TYPED
from hf_kvcache.eval import questioning, tasks
from hf_kvcache.eval.running import SETTINGS

FAST = ["--lengths", "128", "--instances", "2", "--dtype", "fp32", "--device", "cpu", "--tasks", "colours"]
CACHES = ["--caches", "quant:bits=4,window=16", "keydiff:ratio=0.5"]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    def tasks_named(text):
        if text != "colours":
            raise ValueError(f"no task is called {text!r}")
        return [COLOURS]

    monkeypatch.setattr(tasks, "tasks_named", tasks_named, raising=False)


def run(capsys, *args):
    """Exit code, standard output and standard error of one call."""
    return main(["eval", *args]), *capsys.readouterr()


def test_an_evaluation_writes_lines_summary_and_table(capsys, tmp_path):
    assert TYPED == tuple(SETTINGS)
    settings = ["--settings", "turns", "unknown", "--questions", "2"]
    code, out, _ = run(capsys, *FAST, *CACHES, *settings, "--out", str(tmp_path))
    assert code == 0
    first, *lines = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert first["settings"]["n_questions"] == 2 and first["dtype"] == "float32"
    assert len(lines) == 2 * 3 * 2 * 2 and not any(line["error"] for line in lines)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [(row["setting"], row["cache"]) for row in rows] == [
        (setting, cache) for setting in ("unknown", "turns") for cache in ("dynamic", *CACHES[1:])
    ]
    assert all(row["n_instances"] == 2 for row in rows) and rows[0]["bytes_ratio"] == 1 > rows[1]["bytes_ratio"]
    assert out == (tmp_path / "eval.md").read_text() and "## turns, 128 tokens" in out


def test_a_run_goes_on_and_can_be_extended(capsys, tmp_path, monkeypatch):
    ask, asked = questioning.Questioning._ask, []

    def interrupted(self, reading, spec, questions):
        asked.append(spec.text)
        if len(asked) == 3:
            raise KeyboardInterrupt
        ask(self, reading, spec, questions)

    monkeypatch.setattr(questioning.Questioning, "_ask", interrupted)
    command = [*FAST, *CACHES, "--settings", "known", "--out", str(tmp_path)]
    code, out, err = run(capsys, *command)
    assert code == 130 and "the same command goes on" in err and "| colours | dynamic |" in out
    assert run(capsys, *command)[0] == 0 and len(asked) == 3 + 4
    # one more cache
    assert run(capsys, *command[:-4], "dense", *command[-4:])[0] == 0
    assert len(asked) == 7 + 2 and asked[-1] == "dense"
    code, _, err = run(capsys, *command, "--seed", "1")
    assert code == 2 and "settings.seed was 0, now it is 1" in err and len(asked) == 9


def test_a_failed_cache_is_a_failed_job(capsys, tmp_path, monkeypatch):
    from hf_kvcache import presets

    monkeypatch.setattr(presets.DenseCache, "update", lambda *args, **kwargs: 1 / 0)
    code, out, _ = run(capsys, *FAST, "--caches", "dense", "--settings", "known", "--out", str(tmp_path), "--json")
    assert code == 1
    assert [(row["cache"], row["n_failed"]) for row in json.loads(out)["rows"]] == [("dynamic", 0), ("dense", 2)]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--settings", "turns"], "turns are of several questions"),
        (["--tasks", "dance"], "--tasks: no task is called 'dance'"),
        (["--caches", "quantum"], "no cache is called 'quantum'"),
        (["--lengths", "20000"], "--lengths: this model reads at most 16,384 tokens, not 20,000"),
        (["--lengths", "20"], "19 tokens are too few"),
        (["--out", "/dev/null"], "--out: cannot write to"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr(questioning, "feed", lambda *args: pytest.fail("something was read"))
    code, _, err = run(capsys, *FAST, "--out", str(tmp_path / "new"), *args)
    assert code == 2 and message in err and not (tmp_path / "new").exists()


def test_answers_count_for_the_length_of_a_model(capsys, tmp_path, monkeypatch):
    def build(*args, **kwargs):
        instance = COLOURS.build(*args, **kwargs)
        return replace(instance, questions=tuple(replace(q, max_new_tokens=20_000) for q in instance.questions))

    monkeypatch.setattr(tasks, "tasks_named", lambda text: [replace(COLOURS, build=build)])
    code, _, err = run(capsys, *FAST, "--out", str(tmp_path))
    assert code == 2 and "not 20,1" in err and "(answers included)" in err
