"""The command line from end to end, on the embedded model with short contexts."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import pytest

from hf_kvcache import embedded_model
from hf_kvcache.cli import COMMANDS, build_parser, main

FAST = ["--context", "256", "--eval-context", "256", "--new-tokens", "2", "--rounds", "1", "--dtype", "fp32"]


def run(capsys, *args):
    """Exit code, standard output and standard error of one call."""
    try:
        code = main(list(args))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        assert run(capsys, name, "--help")[0] == 0


def test_every_command_has_help_for_every_argument():
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert command.description, name
        assert all(action.help for action in command._actions), name


def test_compare_writes_table_json_and_picture(capsys, tmp_path):
    caches = "dense", "quant:bits=4", "keydiff:ratio=0.25"
    code, out, _ = run(capsys, "compare", *FAST, "--out", str(tmp_path), "--caches", *caches)
    assert code == 0
    for name in ("dynamic", *caches, "TTFT", "perplexity and KL"):
        assert name in out
    result = json.loads((tmp_path / "compare.json").read_text())
    rows = {row["cache"]: row for row in result["rows"]}
    assert list(rows) == ["dynamic", *caches]
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows["dense"]["perplexity"] == pytest.approx(rows["dynamic"]["perplexity"], rel=1e-3)
    assert rows["dense"]["retrieval"] == rows["dynamic"]["retrieval"]
    assert rows["keydiff:ratio=0.25"]["kl"] > rows["dense"]["kl"]
    assert (tmp_path / "compare.png").exists() or "matplotlib" not in sys.modules
    about, *lines = map(json.loads, (tmp_path / "compare.jsonl").read_text().splitlines())
    assert about == {name: value for name, value in result.items() if name != "rows"}
    assert {line["cache"]: line for line in lines} == {name: row | {"is_final": True} for name, row in rows.items()}


def test_the_front_of_a_comparison(capsys):
    caches = "quant:bits=4", "keydiff:ratio=0.25"
    code, out, _ = run(capsys, "compare", *FAST, "--pareto", "--json", "--caches", *caches)
    points = {point["cache"]: point for point in json.loads(out)["pareto"]}
    assert code == 0 and points.keys() == {"dynamic", *caches}
    assert points["dynamic"]["level"] == 1 and points["quant:bits=4"]["beaten_by"] is None
    code, out, _ = run(capsys, "compare", *FAST, "--pareto", "--caches", "keydiff:ratio=0.25")
    assert code == 0 and "| level | cache | bytes | KL, nats | decode | beaten by |" in out


def test_speeds_of_a_comparison_stand_beside_scores(capsys, tmp_path):
    """What `--speed-only` measures is what `report --speed` reads."""
    from hf_kvcache.eval.speeds import read_speeds

    code, *_ = run(capsys, "compare", *FAST, "--speed-only", "--out", str(tmp_path), "--caches", "quant:bits=4")
    assert code == 0
    about, *lines = map(json.loads, (tmp_path / "compare.jsonl").read_text().splitlines())
    assert lines[-1]["is_final"] and lines[-1]["kl"] is None and lines[-1]["bytes_ratio"] < 1
    speeds, (note,) = read_speeds(tmp_path, about)
    assert list(speeds) == ["dynamic", "quant:bits=4"] and speeds["dynamic"] == 1 and "after 256 tokens" in note
    code, _, err = run(capsys, "compare", *FAST, "--speed-only", "--pareto")
    assert code == 2 and "leave out --speed-only" in err


def test_an_interrupted_comparison_keeps_what_it_has(capsys, tmp_path, monkeypatch):
    """The second cache is being scored when somebody presses Ctrl-C; what ran before it is printed and on disk."""
    from hf_kvcache.eval import fidelity

    score, printed = fidelity.fidelity, []

    def interrupted(*args):
        printed.append(capsys.readouterr().out)
        if len(printed) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(fidelity, "fidelity", interrupted)
    code, out, err = run(capsys, "compare", *FAST, "--out", str(tmp_path), "--caches", "dense", "quant:bits=4")
    assert code == 130 and "compare.jsonl has what was measured" in err
    # there is no terminal, so the first row was printed before the second was scored
    _, heading, row = printed[1].splitlines()
    assert printed[0] == "" and "perplexity" in heading and row.startswith("dynamic")
    assert out.startswith("Bytes, time to the first token")
    about, *lines = map(json.loads, (tmp_path / "compare.jsonl").read_text().splitlines())
    last = {line["cache"]: line for line in lines}
    assert about["settings"]["context"] == 256 and list(last) == ["dynamic", "dense", "quant:bits=4"]
    assert [line["is_final"] for line in last.values()] == [True, False, False]
    assert last["dynamic"]["kl"] is not None and all(line["nbytes"] and line["speedup"] for line in last.values())
    assert not (tmp_path / "compare.json").exists()


def test_a_comparison_warns_of_nothing(capsys, tmp_path, unsaid):
    """Neither transformers of a name that it gives up, nor we of bases that are fitted on purpose."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(capsys, "compare", *FAST, "--out", str(tmp_path), "--caches", "dynamic", "lowrank:rank=0.5")[0] == 0
    assert [str(w.message) for w in said if w.category is not ResourceWarning] == []


@pytest.mark.parametrize(
    "args",
    [
        ["compare", "--out"],
        ["generate", "--prompt", "a", "--save"],
        ["export", "--method", "quant:bits=4", "--out"],
        ["calibrate", "lowrank", "--out"],
    ],
    ids=lambda args: args[0],
)
@pytest.mark.parametrize("is_file", [True, False], ids=["file", "below-a-file"])
def test_what_cannot_be_written_is_found_out_first(capsys, tmp_path, monkeypatch, args, is_file):
    for module in ("commands.compare", "commands.generate", "commands.export", "trainers.calibrate_lowrank"):
        monkeypatch.setattr(f"hf_kvcache.{module}.load_model", lambda args: pytest.fail("a model was loaded"))
    taken = tmp_path / "taken"
    taken.write_text("")
    code, _, err = run(capsys, *args, str(taken if is_file else taken / "deeper"))
    assert code == 2 and f"{args[-1]}: cannot write to" in err


def test_a_result_that_cannot_be_replaced_is_found_out_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kvcache.commands.compare.load_model", lambda args: pytest.fail("a model was loaded"))
    (tmp_path / "compare.json").mkdir()
    code, _, err = run(capsys, "compare", "--out", str(tmp_path))
    assert code == 2 and "--out: cannot write to" in err


def test_compare_prints_json_alone(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The rain fell on the harbour and the boats lay still. " * 60)
    code, out, _ = run(capsys, "compare", *FAST, "--json", "--caches", "dynamic", "--text", str(text), "--attn", "sdpa")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert row["cache"] == "dynamic" and row["bytes_ratio"] == 1


def test_compare_reports_a_failed_cache_and_goes_on(capsys, monkeypatch):
    from hf_kvcache import presets

    monkeypatch.setattr(presets.DenseCache, "update", lambda *args, **kwargs: 1 / 0)
    code, out, _ = run(capsys, "compare", *FAST, "--caches", "dense", "quant:bits=8")
    assert code == 1
    assert "ZeroDivisionError" in out and "quant:bits=8" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["compare", "--caches", "quantum"], "no cache is called 'quantum'"),
        (["compare", "--caches", "quant:bits=5"], "bits=5 is not one of"),
        (["compare", "--text", "no/such/file.txt"], "--text: cannot read 'no/such/file.txt'"),
        (["compare", "--model", "./no/such/model"], "cannot load the model './no/such/model'"),
        (["compare", "--model", "./smolm2"], "(is 'smollm2' meant?)"),
        (["compare", "--context", "99999"], "this model reads at most"),
        (["compare", "--eval-context", "10"], "use at least 64"),
        (["compare", "--caches", "dense", "--all"], "not allowed with"),
        (["compare", "--device", "abacus"], "--device abacus"),
        (["compare", "--dtype", "int8"], "invalid choice"),
        (["check"], "one of the arguments --cache --config is required"),
        (["check", "--cache", "dense", "--config", "a"], "not allowed with"),
        (["check", "--cache", "quantum"], "no cache is called 'quantum'"),
        (["generate"], "--prompt TEXT or --prompt-file FILE"),
        (["generate", "--prompt", "a", "--cache", "keydiff"], "give either budget="),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["generate", "--load", "d", "--cache", "dense"], "leave --cache out"),
        (["generate", "--load", "no/such/cache"], "no/such/cache holds no saved cache"),
        (["generate", "--prompt", "a", "--cache", "dynamic", "--save", "d"], "cannot be saved"),
        (["dance"], "invalid choice"),
        ([], "required"),
    ],
    ids=" ".join,
)
def test_mistakes_end_with_two_and_a_sentence(capsys, args, message):
    code, out, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


WHOLE = "-1", "0", "1.5", "nan", "inf", "many", ""
NONSENSE = {
    **{("compare", option): WHOLE for option in ("--context", "--eval-context", "--new-tokens", "--rounds")},
    **{
        ("eval", option): WHOLE
        for option in ("--lengths", "--instances", "--questions", "--batch-size", "--max-new-tokens")
    },
    ("eval", "--continuation"): WHOLE,
    ("eval", "--seed"): ("-1", "0.5", "nan", "first", ""),
    ("report", "--least"): ("-1", "0", "1.5", "nan", "inf", "some", ""),
    ("generate", "--max-new-tokens"): WHOLE,
    ("generate", "--chunk"): WHOLE,
    ("generate", "--temperature"): ("-1", "-0.01", "nan", "inf", "-inf", "hot", ""),
    ("calibrate lowrank", "--samples"): WHOLE,
    ("calibrate lowrank", "--measured"): WHOLE,
    **{("tune", option): WHOLE for option in ("--context", "--pieces", "--rounds")},
    **{("tune", option): ("-1", "0.5", "nan", "first", "") for option in ("--needles", "--seed")},
    **{
        ("tune", option): ("-1", "-0.5", "nan", "inf", "some", "")
        for option in ("--max-kl", "--needle-weight", "--tokens-per-second")
    },
    ("tune", "--bytes"): ("-1", "0", "1.5", "nan", "inf", "some", ""),
    **{("check", option): WHOLE for option in ("--context", "--pieces")},
    **{("check", option): ("-1", "0.5", "nan", "first", "") for option in ("--needles", "--seed", "--decode")},
    **{("check", option): ("-1", "0", "101", "nan", "inf", "some", "") for option in ("--max-loss", "--max-repeats")},
    ("check", "--max-kl"): ("-1", "-0.5", "nan", "inf", "some", ""),
    ("check", "--max-bytes"): ("-1", "0", "1.5", "nan", "inf", "some", ""),
    ("calibrate lowrank", "--length"): WHOLE,
    ("calibrate lowrank", "--prose-share"): ("-0.1", "1.01", "nan", "inf", "half", ""),
    ("calibrate lowrank", "--rank"): ("-0.5", "0", "1.01", "nan", "inf", "half", ""),
    ("calibrate lowrank", "--group-size-k"): WHOLE,
    ("calibrate lowrank", "--group-size-v"): WHOLE,
    ("calibrate lowrank", "--refine"): ("-1", "0.5", "nan", "twice", ""),
}


@pytest.mark.parametrize("command, option", NONSENSE, ids=lambda word: word)
def test_numbers_that_make_no_sense_are_refused(capsys, command, option):
    for value in NONSENSE[command, option]:
        code, _, err = run(capsys, *command.split(), f"{option}={value}")
        assert code == 2, value
        # argparse's own words for a type of Python's tell nobody what would be right
        assert f"argument {option}: {value} is not a" in err, err


def test_every_number_of_every_command_is_checked():
    def options(parser, name=""):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, sub in action.choices.items():
                    yield from options(sub, f"{name} {word}".strip())
            elif action.type is not None:
                yield name, action.option_strings[0], action.type

    found = list(options(build_parser()))
    assert not [each for each in found if each[2] in (int, float)]
    assert {each[:2] for each in found if each[2] is not Path} == set(NONSENSE)


def test_short_text_is_a_mistake(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    code, _, err = run(capsys, "compare", *FAST, "--caches", "dense", "--text", str(text))
    assert code == 2 and "give a longer text" in err


def test_methods_lists_the_registry(capsys):
    from hf_kvcache.registry import METHODS

    code, out, _ = run(capsys, "methods", "--markdown")
    assert code in (0, None)
    lines = out.splitlines()
    assert len(lines) == len(METHODS) + 2 and len({line.count("|") for line in lines}) == 1
    assert "quanto" in run(capsys, "methods")[1]


def test_methods_of_one_page(capsys):
    code, out, _ = run(capsys, "methods", "--markdown", "--page", "retrofits")
    assert code in (0, None) and [line.split("`")[1] for line in out.splitlines()[2:]] == ["dmc", "dms"]
    for wrong in (["--markdown", "--page", "nowhere"], ["--page", "retrofits"]):
        code, _, err = run(capsys, "methods", *wrong)
        assert code == 2 and "eviction, retrofits" in err


def test_doctor_names_a_backend_for_every_op(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    found = json.loads(out)
    ops = {row["op"]: row for row in found["backends"]}
    assert {"dense_attention", "quant_attention", "quant_pack"} <= ops.keys()
    assert all(row["backend"] in ("native", "triton", "reference") and row["reason"] for row in ops.values())
    assert found["versions"]["torch"] and found["native"]["cache folder"]
    assert "backends" in run(capsys, "doctor")[1]


def test_generate_streams_text_and_counts(capsys):
    code, out, err = run(capsys, "generate", "--prompt", "The old bridge", "--max-new-tokens", "8", "--dtype", "fp32")
    assert code == 0
    assert out.strip()
    assert "tokens/s" in err and "of the dense" in err
    again = run(capsys, "generate", "--prompt", "The old bridge", "--max-new-tokens", "8", "--dtype", "fp32")
    assert again[1] == out


@pytest.mark.parametrize(
    "cache", ["dynamic", "streaming:budget=64", "keydiff:budget=128+quant:bits=8", "kvzip:ratio=0.5"]
)
def test_generate_takes_any_cache(capsys, cache):
    code, out, _ = run(
        capsys, "generate", "--prompt", "The old bridge " * 30, "--max-new-tokens", "4", "--cache", cache
    )
    assert code == 0 and out.strip()


def test_a_long_prompt_is_read_in_chunks(capsys):
    common = "generate", "--prompt", "The old bridge " * 60, "--max-new-tokens", "4", "--dtype", "fp32"
    code, out, err = run(capsys, *common, "--cache", "locret:budget=128,n_recent=16", "--chunk", "64")
    assert code == 0 and out.strip() and "of the dense" in err
    lossless = run(capsys, *common, "--cache", "dense"), run(capsys, *common, "--cache", "dense", "--chunk", "50")
    assert lossless[0][1] == lossless[1][1]
    code, _, err = run(capsys, *common, "--chunk", "0")
    assert code == 2 and "--chunk: 0 is not a positive number" in err


def test_an_adapter_that_is_none_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "generate", "--prompt", "x", "--adapter", str(tmp_path))
    assert code == 2 and "--adapter:" in err


def test_train_hands_its_arguments_on(capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        main(["train", "retaining-heads", "--help"])
    assert done.value.code == 0 and "--target" in capsys.readouterr().out
    out = tmp_path / "heads"
    sizes = "--max-steps", "2", "--prompt-tokens", "128", "--answer-tokens", "32", "--d-r", "4", "--valid-prompts", "1"
    assert run(capsys, "train", "retaining-heads", *sizes, "--out", str(out))[0] == 0
    assert (out / "adapter_model.safetensors").is_file()
    code, _, err = run(capsys, "train", "retaining-heads", "--prompt-tokens", "32", "--out", str(out))
    assert code == 2 and "holds no facts between prose" in err


@pytest.mark.parametrize("cache", [(), ("--cache", "kvzip:ratio=0.5")], ids=["default", "kvzip"])
def test_saved_prompt_goes_on_as_it_would_have(capsys, tmp_path, cache):
    folder = str(tmp_path / "saved")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It rained all night upon the moor, and in the morning the river had risen. " * 12)
    common = "--max-new-tokens", "8", "--dtype", "fp32"
    code, out, _ = run(capsys, "generate", "--prompt-file", str(prompt), "--save", folder, *cache, *common)
    assert code == 0
    code, again, err = run(capsys, "generate", "--load", folder, *common)
    assert (code, again) == (0, out)
    assert "(1 tokens read)" in err
    code, more, err = run(capsys, "generate", "--load", folder, "--prompt", " Then the old man said", *common)
    assert code == 0 and more.strip()


def test_folder_of_another_cache_is_refused(capsys, tmp_path):
    folder = tmp_path / "saved"
    args = "--max-new-tokens", "2", "--prompt", "It rained all night upon the moor."
    assert run(capsys, "generate", *args, "--save", str(folder))[0] == 0
    (folder / "prompt.json").write_text('{"ids": [1, 2, 3]}')
    code, _, err = run(capsys, "generate", "--load", str(folder))
    assert code == 2 and "belongs to another cache" in err


def test_missing_embedded_model_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_kvcache.models.embedded_model", lambda: tmp_path)
    code, _, err = run(capsys, "generate", "--prompt", "a")
    assert code == 2 and "--model ID_OR_PATH" in err
    assert embedded_model().exists()
