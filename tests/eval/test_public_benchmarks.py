"""Published data sets as tasks: rows from files, what is asked of them, and how they are cut."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rows_of_benchmarks import INFINITEBENCH, LEVAL, LONGBENCH_V2, WORDS, longbench, text, write

from hf_kvcache.eval import benchmarks
from hf_kvcache.eval.benchmarks import Source
from hf_kvcache.eval.benchmarks import longbench as of_longbench
from hf_kvcache.eval.benchmarks.cutting import without_middle
from hf_kvcache.eval.benchmarks.datasets import LEAST
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.running import Settings, build_instance


def count(text):
    """Tokens of a toy tokenizer: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class Toy:
    """A tokenizer with a chat template."""

    bos_token_id = None
    chat_template = "user/assistant"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r"\w+|[^\w\s]|\s+", text)}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **kwargs):
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "longbench" / "hotpotqa.jsonl", [longbench(i) for i in range(6)])
    rows = [longbench(i, all_classes=["City", "Food"], answers=["Food"]) for i in range(2)]
    write(tmp_path / "longbench" / "data" / "trec.jsonl", rows)
    write(tmp_path / "v2" / "data.json", [LONGBENCH_V2, LONGBENCH_V2 | {"length": "long", "answer": "D"}])
    for name, row in INFINITEBENCH.items():
        write(tmp_path / f"infinitebench_{name}.jsonl", [row])
    for name, row in LEVAL.items():
        rows = [row, row | {"evaluation": "LLM"}, row | {"input": text(7)}]
        write(tmp_path / "LEval" / "Exam" / f"{name}.jsonl", rows)
    return tmp_path


def one(name, folder, seed=None):
    (found,) = benchmarks.named(name, Source(folder), seed)
    return found


def built(name, folder, n_tokens=100_000, i=0, n_questions=1):
    rng = np.random.default_rng(0)
    return one(name, folder).task.build(count, n_tokens, rng, n_questions=n_questions, i=i)


def test_what_is_asked_stands_behind_the_text(folder):
    for name in ("longbench:hotpotqa", "longbench_v2", *(f"infinitebench:{name}" for name in INFINITEBENCH)):
        instance = built(name, folder)
        (question,) = instance.questions
        assert instance.context and instance.instruction and question.answers
        row = longbench(0) if name == "longbench:hotpotqa" else LONGBENCH_V2
        if name.startswith("infinitebench"):
            row = INFINITEBENCH[name.partition(":")[2]]
        assert instance.context == row["context"].strip()
        asked = row.get("question", row.get("input")).strip()
        if name not in ("infinitebench:longbook_sum_eng", "infinitebench:code_run"):
            assert asked in question.text and (not asked or asked not in instance.instruction)
    assert "that {x}" in built("longbench_v2", folder).questions[0].text
    run = built("infinitebench:code_run", folder)
    assert "func_7(-3)" in run.questions[0].text + run.questions[0].prefix and "func_7" not in run.instruction


def test_answers_and_lengths_are_the_published_ones(folder):
    found = {name: built(f"infinitebench:{name}", folder).questions[0] for name in INFINITEBENCH}
    assert found["passkey"].answers == ("71432",) and found["passkey"].max_new_tokens == 6
    assert found["longbook_choice_eng"].answers == ("Bo", "B") and found["code_debug"].answers == ("run", "C")
    assert found["math_find"].answers == ("9",) and found["math_calc"].answers == ("1", "4", "-5")
    assert found["math_calc"].max_new_tokens == 30_000 and found["kv_retrieval"].answers == ("c-d",)
    question = built("longbench:hotpotqa", folder, i=2).questions[0]
    assert (question.answers, question.max_new_tokens) == (("row 2", "none"), 32)
    assert built("longbench:trec", folder).questions[0].choices == ("City", "Food")
    assert built("longbench_v2", folder, i=1).questions[0].answers == ("D",)
    assert one("longbench_v2:long", folder).n_instances() == 1
    with pytest.raises(ValueError, match="has no rows of longbench_v2:medium"):
        one("longbench_v2:medium", folder).n_instances()


def test_scores_of_right_answers(folder):
    for name in ("longbench:hotpotqa", "longbench:trec", *(f"infinitebench:{name}" for name in INFINITEBENCH)):
        task, question = one(name, folder).task, built(name, folder).questions[0]
        said = question.answers[0]
        if name.endswith("math_calc"):
            # signs are not read (as published), so that the last value is not found
            assert task.score("[1, 4, -5]", question) == pytest.approx(2 / 3)
        else:
            said = f"{question.answers[1]}." if name.endswith("code_debug") else said
            assert task.score(said, question) == 1, name
        assert task.score("x", question) == 0, name


def test_questions_about_one_text_are_one_instance(folder):
    data = one("leval:quality", folder)
    # of the two texts that can be scored; what is to be judged by a model is left out
    assert [data.n_instances(n) for n in (1, 2, 3, 4)] == [6, 2, 2, 0]
    instance = built("leval:quality", folder, n_questions=2, i=1)
    assert instance.context == text(7) and [q.answers for q in instance.questions] == [("(B) Bo",), ("(A) now",)]
    assert built("leval:quality", folder, i=5).questions[0].answers == ("(A) no",)
    assert one("longbench:hotpotqa", folder).n_instances(2) == 0
    words = built("leval:news_summ", folder).questions[0].text
    assert "Use 3 words" in words and built("leval:news_summ", folder).questions[0].max_new_tokens == 512


def test_rows_in_their_order_or_in_one_from_a_seed(folder):
    def order(seed):
        data = one("longbench:hotpotqa", folder, seed)
        build = [data.build(count, 9999, None, i=i).context for i in range(data.n_instances())]
        return [[text(i) for i in range(6)].index(context) for context in build]

    assert order(None) == [*range(6)]
    assert sorted(order(3)) == [*range(6)] and order(3) == order(3) != order(4)
    about = one("longbench:hotpotqa", folder).about()
    assert about["from"] == "hotpotqa.jsonl" and about["rows"] == 6 and about["order"] == "published"
    assert one("longbench:hotpotqa", folder, 3).about()["order"] == "drawn from seed 3"
    write(folder / "longbench" / "hotpotqa.jsonl", [longbench(i) for i in range(5)] + [longbench(5, input="?")])
    assert one("longbench:hotpotqa", folder).about()["sha256"] != about["sha256"]


def test_instances_of_an_evaluation_are_numbered(folder):
    task = one("longbench:hotpotqa", folder).task
    contexts = [build_instance(task, Prompter(Toy()), 9999, i, Settings()).context for i in range(6)]
    assert contexts == [text(i) for i in range(6)]


def test_few_shot_examples_are_read_without_a_chat_template(folder):
    prompter = Prompter(Toy())
    plain = prompter.prompt(built("longbench:trec", folder))
    assert "<" not in plain.context[0] and "assistant" not in "".join(plain.questions[0])
    assert prompter.prompt(built("longbench:hotpotqa", folder)).context[0] == "<"


# -- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [150, 233, 500])
def test_the_middle_is_left_out(folder, n_tokens):
    whole, cut = built("longbench:hotpotqa", folder), built("longbench:hotpotqa", folder, n_tokens)
    question = whole.questions[0]
    rest = count(whole.instruction) + count(question.text) + question.max_new_tokens
    assert cut.questions == whole.questions and cut.instruction == whole.instruction
    assert n_tokens - 2 <= count(cut.context) + rest <= n_tokens
    n_head = len(re.match(r".*?(?= of line (\d+) )", cut.context)[0])
    assert cut.context[:n_head] == whole.context[:n_head] and cut.context.endswith(whole.context[-40:])
    # as much of the beginning as of the end
    for n in range(len(cut.context)):
        if whole.context.startswith(cut.context[:n]) and whole.context.endswith(cut.context[n:]):
            assert abs(count(cut.context[:n]) - count(cut.context[n:])) <= 2
            break
    else:
        pytest.fail("it is not the beginning and the end")


def test_what_fits_stays_whole():
    for n in (0, 1, 5, 6, 7):
        found = without_middle("a b c d e f", n, count)
        assert count(found) <= n and (n < 6 or found == "a b c d e f")
    asked = []
    without_middle(" ".join(WORDS) * 10_000, 64, lambda text: asked.append(len(text)) or count(text))
    # a long text is not counted as a whole
    assert max(asked) <= 16 * 64 and len(asked) < 40


def test_too_few_tokens_for_a_text(folder):
    data = one("longbench:hotpotqa", folder)
    least = data.least_tokens(count, 6, 1)
    assert count(data.build(count, least, None).context) >= LEAST - 2
    with pytest.raises(ValueError, match=f"longbench:hotpotqa needs at least {least} tokens"):
        data.build(count, least - 1, None)


# -- files -----------------------------------------------------------------------------------------------------------


def test_rows_in_an_archive(tmp_path):
    write(tmp_path / "musique.jsonl", [longbench(1), longbench(2, input="one\u2028line")])
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(tmp_path / "musique.jsonl", "data/musique.jsonl")
    (tmp_path / "musique.jsonl").unlink()
    assert built("longbench:musique", tmp_path, i=1).context == text(2)
    with pytest.raises(ValueError, match="data.zip has no qasper.jsonl"):
        one("longbench:qasper", tmp_path).n_instances()
    (tmp_path / "data.zip").write_bytes(b"none")
    with pytest.raises(ValueError, match="is no ZIP file"):
        one("longbench:qasper", tmp_path).n_instances()


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"input": "x"}\n', "is not of the form of longbench:qasper: KeyError: 'answers'"),
        ('{"input": "x"}\n{"inp', "qasper.jsonl, row 2: no JSON"),
        ("", "has no rows"),
        ("[1]\n", "has no rows"),
        (None, "neither qasper.jsonl nor longbench_qasper.jsonl is in .* on the Hub it is data.zip of zai-org/LongB"),
    ],
)
def test_files_that_have_no_rows_say_so(tmp_path, content, said):
    if content is not None:
        (tmp_path / "qasper.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        one("longbench:qasper", tmp_path).n_instances()


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "qasper.jsonl", [longbench(0)])
    with pytest.raises(ValueError, match="qasper.jsonl is there 2 times: .*; leave one"):
        one("longbench:qasper", tmp_path).n_instances()
    with pytest.raises(ValueError, match="is no folder"):
        one("longbench:qasper", tmp_path / "none").n_instances()


def test_published_prompts_are_used_where_they_lie_beside_the_data(folder):
    ours = one("longbench:hotpotqa", folder).about()
    prompts = {"hotpotqa": "READ\n{context}\nASK {input}"}
    (folder / of_longbench.PROMPTS).write_text(json.dumps(prompts))
    instance = built("longbench:hotpotqa", folder)
    assert (instance.instruction, instance.questions[0].text) == ("READ\n", "\nASK Which row is 0?")
    assert built("longbench:trec", folder).instruction.startswith("Say of which type")
    assert one("longbench:hotpotqa", folder).about()["sha256"] != ours["sha256"]
    (folder / of_longbench.PROMPTS).write_text(json.dumps({"hotpotqa": "{input} {context}"}))
    with pytest.raises(ValueError, match="a prompt has to have its question behind"):
        built("longbench:hotpotqa", folder)


# -- names -----------------------------------------------------------------------------------------------------------


def test_names():
    assert benchmarks.is_named("leval") and benchmarks.is_named("longbench:x") and not benchmarks.is_named("passkey")
    source = Source(Path("none"))
    assert [len(benchmarks.named(group, source)) for group in benchmarks.GROUPS] == [21, 13, 12, 20]
    assert benchmarks.named("longbench:lcc_e", source)[0].kind.origin.file == "data/lcc_e.jsonl"
    with pytest.raises(
        ValueError, match="no data set is called 'leval:x'; there are leval:coursera, .*; groups: longb"
    ):
        benchmarks.named("leval:x", source)


def test_every_prompt_has_its_question_behind_the_text():
    for kind in benchmarks.KINDS.values():
        assert kind.summary and kind.paper and kind.score.__doc__, kind.name
    for prompted in (*of_longbench.SETS.values(), *benchmarks.infinitebench.SETS.values()):
        assert "{" not in prompted.prompt.partition("{context}")[0]


def test_docs_have_the_table_of_data_sets():
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    table = page.read_text(encoding="utf-8").split("<!-- data sets -->")[1].split("<!-- /data sets -->")[0].strip()
    assert table == benchmarks.markdown(), "paste the output of `hf_kvcache.eval.benchmarks.markdown()`"
