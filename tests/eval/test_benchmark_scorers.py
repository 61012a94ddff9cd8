"""Scores of published benchmarks, worked out by hand after their definitions."""

import pytest

from hf_kvcache.eval.benchmarks import leval_scorers, scorers, words
from hf_kvcache.eval.tasks.instances import Question


def asked(*answers, choices=()):
    return Question("", answers, choices=choices)


def test_f1_of_words():
    # "cat sat on mat" and "cat sat": precision 2 / 4, recall 2 / 2
    assert scorers.qa_f1("The cat sat on a mat.", asked("A cat sat!")) == pytest.approx(2 / 3)
    assert scorers.qa_f1("the", asked("a")) == scorers.qa_f1("", asked("cat")) == 0
    # a word counts as often as both have it
    assert words.f1("a a b".split(), "a b b".split()) == pytest.approx(2 / 3)
    # of several answers the best one
    assert scorers.qa_f1("dog", asked("cat", "dog")) == 1


def test_f1_of_characters():
    # 北京, 在北 of six and three characters: two are common
    assert scorers.qa_f1_zh("我住在北京。 A", asked("北京市")) == pytest.approx(2 * 2 / (6 + 3))
    assert scorers.qa_f1_zh("「北 京」", asked("北京")) == 1


def test_rouge_l_of_whole_texts():
    # "police killed the gunman" and "police kill the gunman" (Lin 2004, section 3.1): 3 of 4 and of 4
    assert scorers.rouge_l("Police kill the gunman", asked("police killed the gunman.")) == pytest.approx(0.75)
    # "the gunman kill police": 2 of 4
    assert scorers.rouge_l("the gunman kill police", asked("police killed the gunman")) == pytest.approx(0.5)
    assert scorers.rouge_l("", asked("x")) == scorers.rouge_l("...", asked("x")) == 0


def test_rouge_l_of_lines():
    """The union of common subsequences (Lin 2004, section 3.2): w1 w2, and w1 w3 w5, are four of five words."""
    reference, answer = "w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"
    assert scorers.rouge_l_sum(answer, asked(reference)) == pytest.approx(2 * (4 / 5) * (4 / 10) / (4 / 5 + 4 / 10))
    # by distinct words: eight in the answer; sentences end in stops
    distinct = scorers.rouge_l_distinct(answer.replace("\n", ". "), asked(reference))
    assert distinct == pytest.approx(2 * 4 / (8 + 5))
    # words as they are written, and once each
    assert (
        scorers.rouge_l_distinct("go go go", asked("go")) == 1 and scorers.rouge_l_sum("go go go", asked("go")) == 0.5
    )
    assert scorers.rouge_l_distinct("Go", asked("go")) == scorers.rouge_l_distinct(" ", asked("go")) == 0
    assert scorers.rouge_l_distinct_zh("今天 下雨", asked("今天下雨")) == 1


def test_classes():
    classes = ("City", "Other city", "Food", "Other location")
    question = asked("Other city", choices=(*classes, "city"))
    assert scorers.classification("Other city", question) == 1
    # "city" is a part of the right one's name, "Food" is not
    assert scorers.classification("Other city, or Food", question) == 0.5
    assert scorers.classification("Food", question) == 0
    assert scorers.first_line(scorers.classification)("\nFood\nType: Other city", question) == 0


def test_numbers():
    assert scorers.right_numbers("Paragraph 3, or 12, or 3", asked("Paragraph 3")) == pytest.approx(2 / 3)
    assert scorers.right_numbers("段落30", asked("段落3")) == scorers.right_numbers("none", asked("3")) == 0


def test_similarity_of_code():
    # comments are passed over; 2 * 8 of 10 + 9 characters are common
    assert scorers.code_similarity("\n# sum\nreturn a+b\n", asked("return ab")) == round(100 * 18 / 19) / 100
    assert scorers.code_similarity("// all\n`x`", asked("return ab")) == 0
    assert scorers.code_similarity("return ab\nreturn", asked("return ab")) == 1


def test_letters_of_longbench_v2():
    for said in ("The correct answer is (B).", "**The correct answer is B**", "So: The correct answer is (B) or (C)"):
        assert scorers.letter(said, asked("B")) == 1
    for said in ("B", "the correct answer is (B)", "The correct answer is (C)", "The correct answer is: (B)"):
        assert scorers.letter(said, asked("B")) == 0


def test_first_numbers_of_infinitebench():
    assert (
        scorers.first_digits(" 71432. 9", asked("71432")) == 1 and scorers.first_digits("9 71432", asked("71432")) == 0
    )
    assert scorers.first_number("it is 3.50", asked("3.5")) == 1 and scorers.first_number("3.5", asked("3")) == 0
    assert scorers.first_number("12 or 3", asked("12")) == 1 and scorers.first_number("none", asked("12")) == 0
    # the second value is wrong, so that the third does not count
    assert scorers.first_numbers("[1, 3, 9]", asked("1", "4", "9")) == pytest.approx(1 / 3)
    # signs are not read, so that a negative value is never right
    assert scorers.first_numbers("-1", asked("-1")) == 0


def test_words_of_infinitebench():
    assert scorers.one_word('{"key": "ab-1"}', asked("ab-1")) == 1 and scorers.one_word("ab-12", asked("ab-1")) == 0
    assert scorers.one_name("It is Jerry!", asked("JERRY")) == 1 and scorers.one_name("Jerry-x", asked("JERRY")) == 0
    assert scorers.last_integer("the value is: -7.", asked("-7")) == 1
    assert scorers.last_integer("-7 it is", asked("-7")) == scorers.last_integer("", asked("-7")) == 0


def test_choices_of_infinitebench():
    right = asked("The old mill", "B")
    for said in ("B", "B. x", "The old mill", "I think the answer is B", "my option is The old mill", "so (x) B"):
        assert scorers.choice(said, right) == 1, said
    for said in ("", "A", "the answer is C, not B", "the answer is", "maybe C or B", "x"):
        assert scorers.choice(said, right) == 0, said
    right = asked("run", "C")
    for said in ("C.", "C: run", "The answer is: C", "the correct option is: run", "answer: `run`", "is: option C"):
        assert scorers.function(said, right) == 1, said
    for said in ("", "C", "C run", "answer: D", "The answer is:"):
        assert scorers.function(said, right) == 0, said


def test_letters_of_leval():
    assert leval_scorers.first_letter("Answer: B", asked("(B) because")) == 0  # A comes first
    assert leval_scorers.first_letter("it is C", asked("C")) == leval_scorers.first_letter("no idea", asked("A")) == 1
    assert leval_scorers.first_letter("", asked("A")) == 0
    every = leval_scorers.every_letter
    # all of several, a part of them, a wrong one too
    assert every("BA", asked("AB")) == every("A) and B) are right", asked("AB")) == 1
    assert every("A", asked("AB")) == 0.25 and every("ABC", asked("AB")) == 0
    assert every("the letters are D", asked("D")) == 1


def test_exact_match_of_leval():
    number = leval_scorers.final_number
    assert number("2 + 3 = 5. The answer is $5.00 then 7", asked("5")) == 1
    assert number("first 4\nthen 1,205 dollars", asked("1205")) == 1 and number("none", asked("5")) == 0
    assert leval_scorers.contained("The Role of  Art, in society", asked("the role of art")) == 1
    assert leval_scorers.contained("art", asked("the role of art")) == 0
    code = leval_scorers.code_output
    assert code("it prints, after all of this and more: ['a', 1.0]", asked("[a 1]")) == 1
    assert code("the final output is 3 because of all that was said before in 4", asked("3")) == 1
    assert code("3 comes first, and then quite a lot", asked("3")) == 0
    truth = leval_scorers.truth
    assert truth("It is (true), not false", asked("True [fact: False]")) == 1
    assert truth("False", asked("True [fact: False]")) == truth("yes", asked("True")) == 0
