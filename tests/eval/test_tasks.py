"""Generated tasks: as long as asked for, answerable from their text, and from nothing else."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_kvcache.eval.tasks import (
    GROUPS,
    TASKS,
    Instance,
    Question,
    haystacks,
    markdown,
    questions,
    tasks_named,
    vocabulary,
)
from hf_kvcache.eval.tasks.evidence import without_answers
from hf_kvcache.eval.tasks.filling import size
from hf_kvcache.eval.tasks.scoring import first_number, string_match_all, string_match_part
from hf_kvcache.models import embedded_model

TOKENIZER = AutoTokenizer.from_pretrained(embedded_model(), model_max_length=10**6)


def bpe(text):
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def words(text):
    return len(text.split())


def build(name, n_tokens=1000, seed=0, count=words, **options):
    return TASKS[name].build(count, n_tokens, np.random.default_rng(seed), **options)


# what 512 tokens may be too few for, with one question and with four; the embedded model's tokens are short
TOO_SHORT = {
    1: {"niah_multikey_3", "cwe", "qa_2"},
    4: {"niah_multikey_3", "niah_multivalue", "cwe", "vt", "qa_1", "qa_2"},
}


def piece(instance, count):
    """Tokens of the longest line or sentence of a text: what it may be shorter by, if that is more than 5 %."""
    return max(map(count, re.split(r"\n|(?<=[.!?]) ", instance.context)))


@pytest.mark.parametrize("n_questions", [1, 4])
@pytest.mark.parametrize("n_tokens", [512, 1024, 4096])
@pytest.mark.parametrize("count", [bpe, words])
@pytest.mark.parametrize("name", TASKS)
def test_lengths(name, count, n_tokens, n_questions):
    try:
        instance = build(name, n_tokens, count=count, n_questions=n_questions)
    except ValueError as refused:
        assert n_tokens == 512 and name in TOO_SHORT[n_questions]
        least = re.fullmatch(rf"{name} needs at least (\d+) tokens with this tokenizer, and has 512", str(refused))
        n_tokens = int(least[1])
        instance = build(name, n_tokens, count=count, n_questions=n_questions)
    is_coarse = name in ("niah_multikey_3", "kv_retrieval") or name in ("qa_1", "qa_2") and n_tokens < 1024
    least = n_tokens - piece(instance, count) if is_coarse else n_tokens
    assert min(0.95 * n_tokens, least) <= size(instance, count) <= n_tokens
    for question in instance.questions:
        prompt = instance.instruction + instance.context + question.text + question.prefix
        assert count(prompt) + question.max_new_tokens <= n_tokens
        assert question.max_new_tokens >= max(map(count, question.answers))


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides(name):
    assert build(name, seed=3) == build(name, seed=3)
    one, other = build(name, seed=3), build(name, seed=4)
    assert one.context != other.context and one.questions != other.questions


@pytest.mark.parametrize("n_questions", [1, 4])
@pytest.mark.parametrize("name", TASKS)
def test_answers_are_in_the_text_and_nowhere_else(name, n_questions):
    instance = build(name, 1500, n_questions=n_questions)
    blind = without_answers(instance)
    assert blind.questions == instance.questions and len(blind.context) < len(instance.context)
    for question in instance.questions:
        score = TASKS[name].score
        assert score(" ".join(question.answers), question) == 1
        assert score("I do not know.", question) == 0
        assert not any(answer.lower() in (question.text + question.prefix).lower() for answer in question.answers)
        assert all(answer in instance.context for answer in question.answers)
        # who repeats the whole text is right as long as the answers are in it
        if score is not first_number:
            assert score(instance.context, question) == 1
        assert score(blind.context, question) == 0


@pytest.mark.parametrize("name", TASKS)
def test_several_questions_share_a_context(name):
    asked = build(name, 1500, n_questions=4).questions
    assert len(asked) == (1 if name in ("cwe", "fwe") else 4)
    assert len({question.text for question in asked}) == len({question.answers for question in asked}) == len(asked)
    assert len(build(name, 1500).questions) == 1


DEEP = ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "passkey", "vt"]


@pytest.mark.parametrize("name", [*DEEP, "kv_retrieval", "qa_1", "qa_2"])
def test_answers_stand_anywhere(name):
    """As many in each quarter of the text as chance puts there: 40 of 160, 5.5 of them one standard deviation."""
    depths = []
    for seed in range(160):
        instance = build(name, 600, seed)
        # the first of a chain stands early, and any of them anywhere
        answer = instance.questions[0].answers[seed % len(instance.questions[0].answers)]
        depths.append(instance.context.index(answer) / len(instance.context))
    quarters = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert quarters.min() >= (15 if name == "vt" else 22) and min(depths) < 0.08 and max(depths) > 0.92


# -- needles ---------------------------------------------------------------------------------------------------------

NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
WORD = "[a-z]+-[a-z]+"
# kinds of keys and values, needles of a text without those in the haystack, values asked for
NEEDLES = {
    "niah_single_1": (WORD, NUMBER, 1, 1),
    "niah_single_2": (WORD, NUMBER, 1, 1),
    "niah_single_3": (WORD, UUID, 1, 1),
    "niah_multikey_1": (WORD, NUMBER, 4, 1),
    "niah_multikey_2": (WORD, NUMBER, None, 1),
    "niah_multikey_3": (UUID, UUID, None, 1),
    "niah_multivalue": (WORD, NUMBER, 4, 4),
    "niah_multiquery": (WORD, NUMBER, 4, 4),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_needles(name):
    key, value, n_needles, n_answers = NEEDLES[name]
    instance = build(name, 2000, 5)
    (question,) = instance.questions
    found = re.findall(rf"One of the secret (?:number|uuid)s for ({key}) is: ({value})\.", instance.context)
    assert len(found) == n_needles if n_needles else len(found) > 50
    assert len({value for _, value in found}) == len(found)
    named = re.findall(key, question.text)
    named = [name for name in named if name in dict(found)]
    assert Counter(question.answers) == Counter(value for key, value in found if key in named)
    assert len(question.answers) == n_answers and all(key in question.prefix for key in named)


def test_needles_stand_between_sentences():
    needle = r"One of the secret numbers for [a-z-]+ is: \d{7}\."
    for seed in range(20):
        before, after = re.split(needle, build("niah_single_2", 700, seed).context)
        # what ends the text may be cut
        assert not after or after[0] == " " and (not before or before.rstrip('" ').endswith((".", "!", "?")))


def test_prose_is_the_second_half_of_ours_and_starts_again():
    sentences = haystacks.prose()
    assert 150 < len(sentences) and not any(sentence.endswith("Mr.") for sentence in sentences)
    n = words(" ".join(sentences))
    text = " ".join(haystacks.essay(2 * n, np.random.default_rng(0)))
    assert words(text) == 2 * n and all(text.count(sentence) >= 2 for sentence in sentences[::20])


def test_keys_never_run_out():
    rng = np.random.default_rng(0)
    for n in (10, 30_000):
        assert len(set(vocabulary.compounds(n, rng))) == len(set(vocabulary.numbers(n, rng))) == n
    parts = vocabulary.ADJECTIVES + vocabulary.NOUNS
    assert len(set(parts)) == len(parts)


# -- tracking, counting, looking up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_questions", [1, 3])
def test_chains_lead_to_the_answers(n_questions):
    for seed in range(10):
        instance, values = build("vt", 800, seed, n_questions=n_questions), {}
        for variable, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", instance.context, re.MULTILINE):
            # fails where a variable is used before it has been assigned
            values[variable] = source if source.isdigit() else values[source]
        assert len(values) == 5 * n_questions
        for question in instance.questions:
            asked = re.search(r"\d{5}", question.text)[0]
            assert [name for name, value in values.items() if value == asked] == list(question.answers)


@pytest.mark.parametrize("n_tokens, times", [(4095, (6, 1)), (4096, (30, 3)), (40_000, (30, 3))])
def test_common_words(n_tokens, times):
    instance = build("cwe", n_tokens)
    written = re.findall(r"(\d+)\. ([a-z-]+)", instance.context)
    assert [int(number) for number, _ in written] == list(range(1, len(written) + 1))
    found = Counter(word for _, word in written)
    common = instance.questions[0].answers
    assert len(common) == 10 and {found.pop(word) for word in common} == {times[0]}
    assert set(found.values()) == {times[1]} and not any(word in other for other in found for word in common)
    assert instance.instruction.count("Answer:") == 1


def test_frequent_words_follow_a_zeta_distribution():
    for seed in range(10):
        instance = build("fwe", 3000, seed)
        (dots, n), *rest = Counter(instance.context.split()).most_common()
        assert dots == "..." and {word for word, _ in rest[:3]} == set(instance.questions[0].answers)
        assert rest[2][1] > rest[3][1]
        for rank, (word, times) in enumerate(rest, 2):
            assert len(word) == 6 and abs(times - n / rank**2) <= 1


def test_pairs_are_json():
    instance = build("kv_retrieval", 1500, n_questions=4)
    pairs = json.loads(instance.context)
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs)
    for question in instance.questions:
        assert question.answers == (pairs[re.search(UUID, question.text)[0]],)


def test_pass_keys():
    (question,) = build("passkey").questions
    assert re.fullmatch(r"\d{5}", question.answers[0]) and question.prefix.endswith("The pass key is")
    instance = build("passkey", n_questions=3)
    for question in instance.questions:
        of = re.search("of the [a-z-]+", question.text)[0]
        assert f"The pass key {of} is {question.answers[0]}. Keep it in mind." in instance.context


# -- questions about paragraphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, n_needed, n_asked", [("questions", 1, 80), ("two_hops", 2, 20)])
def test_our_paragraphs(kind, n_needed, n_asked):
    collection = questions.own(kind)
    assert len(set(collection.paragraphs)) == 40 and len({row.question for row in collection.asked}) == n_asked
    for row in collection.asked:
        assert len(row.paragraphs) == n_needed
        # the last of those that are needed answers, and no other
        answering = [i for i, text in enumerate(collection.paragraphs) if row.answers[0].lower() in text.lower()]
        assert answering == [row.paragraphs[-1]] and row.answers[0].lower() not in row.question.lower()


@pytest.mark.parametrize("name, kind", [("qa_1", "questions"), ("qa_2", "two_hops")])
def test_documents(name, kind):
    collection = questions.own(kind)
    for n_tokens in (1000, 8000):
        instance = build(name, n_tokens)
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", instance.context)[1:]
        (question,) = instance.questions
        (asked,) = (row for row in collection.asked if question.text.endswith(row.question))
        assert all(documents.count(collection.paragraphs[i]) == 1 for i in asked.paragraphs)
        assert sum(question.answers[0].lower() in text.lower() for text in documents) == 1
        # others come again once all have been used, and the last one may be cut
        assert (len(set(documents)) < len(documents)) == (n_tokens == 8000)
        assert sum(text not in collection.paragraphs for text in documents) <= 1


def test_more_questions_than_paragraphs():
    with pytest.raises(ValueError, match="41 questions about different paragraphs asked for, and there are 40"):
        build("qa_1", 5000, n_questions=41)
    with pytest.raises(ValueError, match="40 questions leave no paragraph"):
        build("qa_1", 5000, n_questions=40)


def test_official_files(tmp_path):
    rows = [{"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann"}]}, {"question": "Why?", "answers": []}]
    contexts = [{"context": "It was Ann. She ran.", "qas": rows}, {"context": "Ann again.", "qas": []}]
    contexts += [{"context": f"Nothing happened on day {i}. It rained.", "qas": []} for i in range(50)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": contexts}]}))
    task = questions.task("mine", "SQuAD", lambda: questions.squad(tmp_path / "squad.json"))
    instance = task.build(words, 700, np.random.default_rng(0))
    assert instance.questions[0].answers == ("Ann",) and "It was Ann. She ran." in instance.context
    # another paragraph with the answer does not come along
    assert "Ann again." not in instance.context and "It rained." in instance.context

    context = [[f"Day {i}", [f"It rained on day {i}.", " Then it stopped."]] for i in range(10)]
    row = {"question": "When?", "answer": "day 3", "context": context, "supporting_facts": [["Day 3", 0], ["Day 5", 1]]}
    (tmp_path / "hotpot.json").write_text(json.dumps([row]))
    collection = questions.hotpot(tmp_path / "hotpot.json")
    assert len(collection.paragraphs) == 10 and collection.asked[0].paragraphs == (3, 5)
    assert collection.paragraphs[3] == "Day 3\nIt rained on day 3. Then it stopped."


# -- scores and names ------------------------------------------------------------------------------------------------


def test_scorers():
    question = Question("", ("Heron", "owl", "1234567"))
    assert string_match_all("HERON, and 1234567.", question) == pytest.approx(2 / 3)
    assert string_match_part("an owl", question) == 1 and string_match_part("a crow", question) == 0
    # as published: what stands inside another word counts
    assert string_match_all("herons\x00owls\t12345678", question) == pytest.approx(1)
    key = Question("", ("48213",))
    assert first_number("It is 48213, not 7.", key) == 1
    assert first_number("7 or 48213", key) == first_number("482130", key) == first_number("", key) == 0


def test_answers_are_taken_out_as_words():
    instance = Instance("", "An Owl, owls, an owl. Barn owl.", (Question("", ("owl", "barn owl")),))
    assert without_answers(instance).context == "An , owls, an . ."


def test_names():
    assert [task.name for task in tasks_named("vt, passkey,vt")] == ["vt", "passkey"]
    assert len(tasks_named("ruler")) == 13 and len(tasks_named("needles")) == 10
    assert [task.name for task in tasks_named("all")] == list(TASKS) == list(GROUPS["all"])
    with pytest.raises(ValueError, match="no task is called 'niah'; tasks: niah_single_1, .*; groups: ruler, needles"):
        tasks_named("vt,niah")


def test_tasks_are_listed_without_torch():
    code = "import sys; from hf_kvcache.eval.tasks import TASKS; print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_docs_have_the_table():
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    table = page.read_text(encoding="utf-8").split("<!-- tasks -->")[1].split("<!-- /tasks -->")[0].strip()
    assert table == markdown(), "paste the output of `hf_kvcache.eval.tasks.markdown()`"
