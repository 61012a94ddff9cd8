"""Source text without what does not exist: what is left runs as the whole would have."""

import textwrap

import pytest

from hf_kvcache.hub.fold import fold


def folded(source, *absent):
    result = fold(textwrap.dedent(source), absent)
    compile(result, "folded", "exec")
    return result


def lines(text):
    return textwrap.dedent(text).lstrip("\n")


BRANCHES = """
    def f(self, x):
        # why
        if isinstance(x, Gone):
            return x
        elif x > 1:
            x += 1
        else:
            # the other way
            x += 2
        return self.policy(x)
"""


def test_a_branch_that_is_always_taken_ends_the_function():
    source = BRANCHES.replace("isinstance", "not isinstance")
    assert folded(source, "Gone") == "\ndef f(self, x):\n    # why\n    return x\n"


def test_a_branch_that_is_never_taken_gives_way_to_the_next():
    kept = """
    def f(self, x):
        # why
        if x > 1:
            x += 1
        else:
            # the other way
            x += 2
        return self.policy(x)
    """
    assert folded(BRANCHES, "Gone") == "\n" + lines(kept)


@pytest.mark.parametrize(
    "expression, left",
    [
        ("a if not make(x) else b", "a"),
        ("a if make(x) else b + c", "b + c"),
        ("a if x else make(y)", "a"),
        ("x or make(y)", "x or None"),
        ("make(y) or x", "x"),
        ("1 if x or not make(y) else 2", "1"),
        ("1 if (x or y) and not make(y) else 2", "1 if (x or y) else 2"),
        ("not (x and make(y))", "True"),
        ("isinstance(x, Gone)", "False"),
        ("isinstance(x, (Gone, int))", "isinstance(x, (int,))"),
        ("{'a': Gone, 'b': int}", "{'b': int}"),
        ("[Gone, int]", "[int]"),
        ("make(x)", "None"),
        ("self.make(x) is None", "True"),
        ("(y := make(x)) is not None", "False"),
        ("-n", "-n"),
        ("unknown and x", "unknown and x"),
    ],
)
def test_expressions(expression, left):
    assert folded(f"r = {expression}\n", "Gone", "make") == f"r = {left}\n"


def test_calls_of_what_is_absent_and_loops_around_nothing_go():
    source = """
    def f(self, x):
        self.note(x)
        for y in x:
            self.note(y)
        return x
    """
    assert folded(source, "note") == "\ndef f(self, x):\n    return x\n"


def test_a_suite_is_never_left_empty():
    source = """
    def f(self):
        if self.on:
            self.note()
    """
    assert folded(source, "note") == "\ndef f(self):\n    if self.on:\n        pass\n"


def test_what_comes_to_none_once_is_none_and_local_names_are_not_absent():
    source = """
    def f(x, gone):
        found = make(x)
        if found is not None or x:
            return gone
        return [gone, 1]
    """
    kept = """
    def f(x, gone):
        found = None
        if x:
            return gone
        return [gone, 1]
    """
    assert folded(source, "gone", "make") == "\n" + lines(kept)


@pytest.mark.parametrize(
    "body",
    [
        # of the same name as what is left out elsewhere, or known there
        "found = look(x)\n    if found is not None:\n        return found",
        "found = None\n    if found is not None:\n        return found",
        "x = x\n    return x and 0",
        "for y in ():\n        pass",
        "n = 0\n    return n > 1",
    ],
)
def test_functions_that_do_not_speak_of_what_is_absent_stay_as_they_are(body):
    source = f"def f(x):\n    {body}\n\n\ndef g(x):\n    make(x)\n    return 1\n"
    assert folded(source, "make") == source.replace("    make(x)\n", "")


def test_a_name_that_is_set_twice_is_no_constant():
    source = "def f(x):\n    n = make(x)\n    for n in x:\n        g(n)\n    if n:\n        return 1\n    return 2\n"
    assert "if n:" in folded(source, "make")


def test_text_beyond_ascii_stays_in_place():
    source = 'x = "→ ü" if not make(y) else "ß"  # – why\n'
    assert folded(source, "make") == 'x = "→ ü"  # – why\n'


def test_an_import_of_what_is_absent_fails_where_it_may():
    source = """
    def f():
        try:
            from a import fast
        except ImportError:
            return None
        return fast
    """
    assert 'raise ImportError("this repository does without it")' in folded(source, "fast")
