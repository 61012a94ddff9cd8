"""Source text with known conditions: what is left runs as the whole would have."""

import textwrap

import pytest

from hf_kvcache.hub.fold import fold


def folded(source, absent=(), **facts):
    result = fold(textwrap.dedent(source), facts, absent)
    compile(result, "folded", "exec")
    return result


def lines(text):
    return textwrap.dedent(text).lstrip("\n")


BRANCHES = """
    def f(self, x):
        # why
        if self.policy is None:
            return x
        elif x > 1:
            x += 1
        else:
            # the other way
            x += 2
        return self.policy(x)
"""


def test_a_branch_that_is_always_taken_ends_the_function():
    assert folded(BRANCHES, policy=None) == "\ndef f(self, x):\n    # why\n    return x\n"


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
    assert folded(BRANCHES, policy=len) == "\n" + lines(kept)


@pytest.mark.parametrize(
    "expression, left",
    [
        ("a if self.on else b", "a"),
        ("a if not self.on else b + c", "b + c"),
        ("x and self.on and y", "x and y"),
        ("x or self.on", "x or self.on"),
        ("self.on or x", "True"),
        ("x or 0", "x or 0"),
        ("1 if x or self.on else 2", "1"),
        ("1 if (x or y) and self.on else 2", "1 if (x or y) else 2"),
        ("not (x and self.off)", "True"),
        ("self.off or x or y", "x or y"),
        ("self.off and x", "False"),
        ("n == 1 and x", "x"),
        ("n > 3", "False"),
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
    facts = {"on": True, "off": False, "n": 1}
    assert folded(f"r = {expression}\n", absent={"Gone", "make"}, **facts) == f"r = {left}\n"


def test_calls_of_what_is_absent_and_loops_around_nothing_go():
    source = """
    def f(self, x):
        self.note(x)
        for y in x:
            self.note(y)
        return x
    """
    assert folded(source, absent={"note"}) == "\ndef f(self, x):\n    return x\n"


def test_names_that_are_put_into_themselves():
    source = "def f(self, x, y):\n    x = x\n    self.x = x\n    x = y = x\n    return x\n"
    assert folded(source) == source.replace("    x = x\n", "", 1)


def test_a_suite_is_never_left_empty():
    source = """
    def f(self):
        if self.on:
            self.note()
    """
    assert folded(source, absent={"note"}) == "\ndef f(self):\n    if self.on:\n        pass\n"
    assert folded(source, on=False) == "\ndef f(self):\n    pass\n"


def test_local_constants_count_and_local_names_are_not_absent():
    source = """
    def f(x, gone):
        is_blind = self.off and x
        if is_blind or x:
            return gone
        return [gone, 1]
    """
    kept = """
    def f(x, gone):
        is_blind = False
        if x:
            return gone
        return [gone, 1]
    """
    assert folded(source, absent={"gone"}, off=False) == "\n" + lines(kept)


def test_a_name_that_is_set_twice_is_no_constant():
    source = "def f(x):\n    n = 0\n    for n in x:\n        g(n)\n    if n:\n        return 1\n    return 2\n"
    assert "if n:" in folded(source)


def test_text_beyond_ascii_stays_in_place():
    source = 'x = "→ ü" if self.on else "ß"  # – why\n'
    assert folded(source, on=True) == 'x = "→ ü"  # – why\n'
    assert folded(source, on=False) == 'x = "ß"  # – why\n'


def test_an_import_of_what_is_absent_fails_where_it_may():
    source = """
    def f():
        try:
            from a import fast
        except ImportError:
            return None
        return fast
    """
    assert 'raise ImportError("this repository does without it")' in folded(source, absent={"fast"})
