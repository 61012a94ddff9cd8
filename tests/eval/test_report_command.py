"""`hf-kvcache report` on folders that were made up."""

import json

import pytest

from hf_kvcache.cli import main
from hf_kvcache.eval.lines import Line, Lines

SETTINGS = {"n_questions": 1, "seed": 0, "uses_template": True}
ABOUT = {"model": "toy", "dtype": "bfloat16", "device": "none", "settings": SETTINGS, "adapter": None}


def write(folder, caches, **changed):
    """An evaluation: `caches` are names with scores and bytes."""
    lines = Lines(folder / "eval.jsonl", ABOUT | changed)
    for cache, (scores, nbytes) in caches.items():
        for i, score in enumerate(scores):
            lines.add(Line("a", 128, i, "known", cache, 0, answer="x", n_answer=1, score=score, nbytes=nbytes))
    return str(folder)


def run(capsys, *args):
    """Exit code, standard output and standard error of one call."""
    return main(["report", *args]), *capsys.readouterr()


def points(out):
    return {point["cache"]: point for point in json.loads(out)["fronts"][0]["points"]}


def test_folders_of_one_model_make_one_report(capsys, tmp_path):
    one = write(tmp_path / "one", {"dynamic": ([1.0, 1.0], 100), "quant": ([1.0, 0.0], 30)})
    other = write(tmp_path / "other", {"dynamic": ([1.0, 1.0], 100), "snapkv": ([1.0, 1.0], 25)})
    code, out, _ = run(capsys, one, other, "--json")
    assert code == 0 and list(points(out)) == ["dynamic", "quant", "snapkv"]
    assert points(out)["quant"]["dominated"]["by"] == "snapkv"
    assert json.loads(out)["notes"] == [
        "2 answers were given in more than one folder, 0 of them differently; those of the folder that was named first "
        "count."
    ]


def test_adapters_are_told_apart(capsys, tmp_path):
    one = write(tmp_path / "one", {"dynamic": ([1.0, 1.0], 100), "locret": ([0.0, 0.0], 25)}, adapter="runs/a")
    other = write(tmp_path / "other", {"dynamic": ([1.0, 1.0], 100), "locret": ([1.0, 0.0], 25)}, adapter="runs/b")
    code, out, _ = run(capsys, one, other, "--json")
    assert code == 0 and set(points(out)) == {"dynamic @ a", "locret @ a", "locret @ b"}
    assert json.loads(out)["fronts"][0]["left_out"] == {"dynamic @ b": "scores as dynamic @ a"}
    # one adapter alone needs no name
    assert set(points(run(capsys, one, "--json")[1])) == {"dynamic", "locret"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": "other"}, "model is 'other', but"),
        ({"dtype": "float32"}, "dtype is 'float32', but"),
        ({"settings": SETTINGS | {"seed": 1}}, "settings.seed is 1, but"),
        ({"settings": SETTINGS | {"max_new_tokens": 8}}, "settings.max_new_tokens is 8, but"),
    ],
)
def test_other_runs_are_refused_by_name(capsys, tmp_path, changed, message):
    one = write(tmp_path / "one", {"dynamic": ([1.0], 100)})
    other = write(tmp_path / "other", {"dynamic": ([1.0], 100)}, **changed)
    code, _, err = run(capsys, one, other)
    assert code == 2 and f"{other}: {message} {one} has" in err


def test_what_is_no_evaluation_is_refused(capsys, tmp_path):
    assert "no evaluation there" in run(capsys, str(tmp_path))[2]
    (tmp_path / "eval.jsonl").write_text('{"model": 1}\n')
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "is no evaluation (KeyError: 'settings')" in err
    nothing = write(tmp_path / "zero", {"dynamic": ([0.0], 100)})
    code, _, err = run(capsys, nothing)
    assert code == 2 and "no task of which the dense cache" in err


def test_half_a_line_is_left_alone(capsys, tmp_path):
    folder = write(tmp_path / "one", {"dynamic": ([1.0, 1.0], 100)})
    path = tmp_path / "one" / "eval.jsonl"
    path.write_text(path.read_text() + '{"task": "a", "len')
    before = path.read_text()
    assert run(capsys, folder)[0] == 0 and path.read_text() == before


def test_files_and_speeds(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = write(
        tmp_path / "one", {"dynamic": ([1.0, 1.0], 100), "quant:bits=4": ([1.0, 0.0], 30), "kvpress:x": ([0.5, 0.0], 9)}
    )
    speeds = tmp_path / "speeds"
    speeds.mkdir()
    first = {"model": "toy", "dtype": "bfloat16", "device": "none", "threads": 2, "settings": {"context": 4096}}
    rows = [{"cache": "dynamic", "speedup": 1.0}, {"cache": "quant:bits=4", "speedup": 1.25}]
    (speeds / "compare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [first, *rows]))
    code, out, _ = run(capsys, folder, "--speed", str(speeds), "--out", str(tmp_path / "out"))
    assert code == 0 and "| 1.25× |" in out and "after 4,096 tokens" in out
    assert (tmp_path / "out" / "report.md").read_text() == out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["fronts"][0]["points"][1]["speed"] == 1.25
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    (speeds / "compare.jsonl").write_text(json.dumps(first | {"dtype": "float32"}) + "\n")
    code, _, err = run(capsys, folder, "--speed", str(speeds))
    assert code == 2 and "dtype is 'float32', but the evaluation has 'bfloat16'" in err
    assert "no comparison there" in run(capsys, folder, "--speed", str(tmp_path))[2]
