"""`hf-kvcache eval` on published data sets and on texts, from end to end on the embedded model."""

import json

import pytest
from rows_of_benchmarks import LEVAL, longbench, text, write

from hf_kvcache.cli import main
from hf_kvcache.eval import continuing, questioning
from hf_kvcache.eval.benchmarks import leval
from hf_kvcache.models import embedded_prose

FAST = ["--dtype", "fp32", "--device", "cpu", "--caches", "keydiff:ratio=0.5"]
SHORT = ["--tasks", "longbench:passage_count", "--settings", "unknown", "--lengths", "256", *FAST]


def run(capsys, *args):
    """Exit code, standard output and standard error of one call."""
    return main(["eval", *map(str, args)]), *capsys.readouterr()


@pytest.fixture
def data(tmp_path):
    rows = [longbench(i, answers=[str(i)]) for i in range(3)]
    write(tmp_path / "data" / "longbench" / "passage_count.jsonl", rows)
    write(tmp_path / "data" / "quality.jsonl", [LEVAL["quality"], LEVAL["quality"] | {"input": text(8)}])
    return tmp_path / "data"


# -- published data sets ---------------------------------------------------------------------------------------------


def test_rows_of_a_data_set_are_asked(capsys, tmp_path, data):
    out = tmp_path / "out"
    command = [*SHORT, "--data", data, "--out", out]
    code, table, _ = run(capsys, *command, "--instances", 2)
    assert code == 0 and "| longbench:passage_count | keydiff:ratio=0.5 |" in table
    _, *lines = map(json.loads, (out / "eval.jsonl").read_text().splitlines())
    assert [line["instance"] for line in lines] == [0, 0, 1, 1]
    # texts are cut so that the question and an answer of 32 tokens fit, too
    assert all(256 - 8 <= line["n_read"] + line["n_asked"] + 32 <= 256 for line in lines)
    assert json.loads((out / "rows.json").read_text())["longbench:passage_count"]["rows"] == 3
    # one more row, and rows that are others
    assert run(capsys, *command, "--instances", 3)[0] == 0
    assert len((out / "eval.jsonl").read_text().splitlines()) == 1 + 6
    code, _, err = run(capsys, *command, "--instances", 3, "--shuffle")
    assert code == 2 and "answers about other rows of longbench:passage_count, which differ in order;" in err
    write(data / "longbench" / "passage_count.jsonl", [longbench(i) for i in range(3)])
    code, _, err = run(capsys, *command, "--instances", 3)
    assert code == 2 and "which differ in sha256; write to another folder" in err
    assert len((out / "eval.jsonl").read_text().splitlines()) == 1 + 6


@pytest.mark.parametrize(
    "args, message",
    [
        (["--instances", "4"], "--instances: longbench:passage_count has 3 instances, not 4; --instances 3"),
        (["--instances", "2", "--questions", "2"], "has 0 instances of 2 questions about one text, not 2; ask fewer"),
        (["--instances", "2", "--lengths", "150"], "--lengths: longbench:passage_count takes at least 1"),
        (["--tasks", "leval:x"], "--tasks: no data set is called 'leval:x'; there are leval:coursera"),
        (["--tasks", "longbench:lcc"], "longbench:lcc: neither lcc.jsonl nor longbench_lcc.jsonl is in"),
        (["--tasks", "passkey"], "--data: no published data set is asked for"),
        (["--tasks", "passkey", "longbench:lcc"], "longbench:lcc: neither lcc.jsonl"),
        (["--texts", "x.txt"], "--texts: the task perplexity is not asked for; add it to --tasks"),
        (["--continuation", "7"], "--continuation: the task perplexity is not asked for"),
    ],
)
def test_what_data_sets_lack_is_found_before_anything_is_read(capsys, tmp_path, data, monkeypatch, args, message):
    monkeypatch.setattr(questioning, "feed", lambda *args: pytest.fail("something was read"))
    code, _, err = run(capsys, *SHORT, "--data", data, "--out", tmp_path / "new", *args)
    assert code == 2 and message in err and not (tmp_path / "new").exists()


def test_a_run_goes_on_with_the_commit_that_it_began_with(capsys, tmp_path, data, monkeypatch):
    asked, snapshot = [], tmp_path / "hub" / "snapshots" / "c0ffee"
    write(snapshot / "passkey.jsonl", [{"context": text(i), "input": "Which?", "answer": "7"} for i in range(2)])

    def download(repository, file, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        return str(snapshot / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    command = ["--tasks", "infinitebench:passkey", *SHORT[2:], "--instances", 1, "--out", tmp_path / "out"]
    assert run(capsys, *command, "--revision", "v1")[0] == 0 and run(capsys, *command)[0] == 0
    repository = "xinrongzhang2022/InfiniteBench"
    assert asked == [(repository, "passkey.jsonl", "dataset", revision) for revision in ("v1", "c0ffee")]
    assert json.loads((tmp_path / "out" / "rows.json").read_text())["infinitebench:passkey"]["from"] == (
        f"{repository}@c0ffee"
    )


def test_several_questions_about_a_text_in_a_row(capsys, tmp_path, data, monkeypatch):
    monkeypatch.setattr(leval, "N_NEW", 4)
    settings = ["--settings", "turns", "--questions", 3, "--instances", 2, "--lengths", 200]
    command = ["--tasks", "leval:quality", *settings, "--data", data, "--out", tmp_path / "out", *FAST]
    code, table, _ = run(capsys, *command, "--json")
    assert code == 0 and [row["n_instances"] for row in json.loads(table)["rows"]] == [2, 2]


# -- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_gone_on_with(capsys, tmp_path):
    prose = embedded_prose().read_text(encoding="utf-8")
    (tmp_path / "a.txt").write_text(prose[:3000])
    (tmp_path / "b.txt").write_text(prose[3000:6000])
    command = ["--texts", tmp_path / "a.txt", tmp_path / "b.txt", "--lengths", 64, "--continuation", 20, *FAST]
    command += ["--out", tmp_path / "out"]
    code, table, _ = run(capsys, *command, "--instances", 2)
    assert code == 0 and "## KL by position, 64 tokens read" in table and "| cache | 1–16 | 17–20 |" in table
    assert table == (tmp_path / "out" / "texts.md").read_text() and not (tmp_path / "out" / "eval.jsonl").exists()
    found = json.loads((tmp_path / "out" / "texts.json").read_text())
    assert found["texts"]["n"] == 2 and found["continuation"] == 20 and len(found["rows"]) == 6
    # more texts and a length are added; another continuation, or other texts, are not
    code, _, _ = run(capsys, *command, "--instances", 3, "--lengths", 64, 96)
    assert code == 0 and len((tmp_path / "out" / "texts.jsonl").read_text().splitlines()) == 1 + 3 * 2 * 2
    code, _, err = run(capsys, *command, "--continuation", 21)
    assert code == 2 and "continuation was 20, now it is 21" in err
    (tmp_path / "b.txt").write_text(prose[:3000])
    code, _, err = run(capsys, *command, "--instances", 2)
    assert code == 2 and "texts.sha256 was" in err


def test_tasks_and_texts_in_one_command(capsys, tmp_path, data, monkeypatch):
    chosen = ["--tasks", "longbench:passage_count", "perplexity", "--settings", "known", "--instances", 1]
    command = [*chosen, "--lengths", 200, "--continuation", 8, "--data", data, "--out", tmp_path, *FAST]
    monkeypatch.setattr(continuing._Together, "_predictions", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run(capsys, *command)
    assert code == 130 and "the same command goes on from" in err and "texts.jsonl" in err
    monkeypatch.undo()
    assert run(capsys, *command)[0] == 0
    assert all((tmp_path / name).exists() for name in ("eval.md", "texts.md", "rows.json"))


def test_the_prose_of_the_package_is_taken_as_far_as_it_goes(capsys, tmp_path):
    command = ["--tasks", "perplexity", "--lengths", 1500, "--continuation", 4, "--out", tmp_path / "out", *FAST]
    code, _, err = run(capsys, *command, "--instances", 100)
    assert code == 2 and "windows of 1,505 tokens, not 100; give more texts, shorter --lengths or --instances" in err
    code, _, err = run(capsys, *command, "--lengths", 16_380)
    assert code == 2 and "--texts: none has 16,385 tokens" in err
    code, _, err = run(capsys, *command, "--lengths", 16_384)
    assert code == 2 and "--lengths: this model reads at most 16,384 tokens, not 16,388 (--continuation)" in err
    code, _, err = run(capsys, *command, "--texts", tmp_path / "none.txt")
    assert code == 2 and "--texts: cannot read" in err and not (tmp_path / "out").exists()
