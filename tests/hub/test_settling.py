"""What a repository does not need of functions and files: values that never change, types, what nothing reads."""

import ast
import textwrap

import pytest

from hf_kvcache.hub.attributes import Attributes, is_mentioned
from hf_kvcache.hub.fixed import settle
from hf_kvcache.hub.fold import fold, passes_on
from hf_kvcache.hub.join import join
from hf_kvcache.hub.parameters import unread_parameters
from hf_kvcache.hub.text import Text, until_done
from hf_kvcache.hub.untyped import untyped
from hf_kvcache.hub.unused import unread, unused


def lines(text):
    return textwrap.dedent(text).lstrip("\n")


def after(source, find):
    """A text after all that can be found in it."""
    source = until_done(Text(lines(source).encode()), find).text.decode()
    compile(source, "after", "exec")
    return source


def test_parameters_that_never_change_go_and_leave_their_value():
    source = """
    class Cache:
        def __init__(self, policy=None, codec=None, *, window: int = 64, edge: int = 0, config=None):
            # why
            self.edge = edge
            self.codec, self.window = codec, window
            self.layers = make(policy, window=window, edge=self.edge)
            if self.edge > 1:
                self.layers = None

        def of(self, codec):
            return codec
    """
    left = """
    class Cache:
        def __init__(self, policy=None, *, window: int = 64, config=None):
            self.window = window
            self.layers = make(policy, window=window)
            if 0 > 1:
                self.layers = None

        def of(self, codec):
            return codec
    """
    assert settle(lines(source), {"edge": 0, "codec": None}) == lines(left)


def test_the_star_goes_with_the_only_parameter_behind_it():
    assert settle("def f(a, *, edge=0):\n    return a + edge\n", {"edge": 0}) == "def f(a):\n    return a + 0\n"
    spread = "def f(\n    a,\n    *,\n    edge=0,\n    b=1,\n):\n    return a\n"
    assert settle(spread, {"edge": 0}) == "def f(\n    a,\n    *,\n    b=1,\n):\n    return a\n"
    # another one's argument of the same name says something else
    assert settle("f(edge=size(3))\n", {"edge": 0}) == "f(edge=size(3))\n"


@pytest.mark.parametrize(
    "expression, left",
    [
        ("dict({})", "{}"),
        ("dict.fromkeys({}, 1)", "{}"),
        ("{'k': 1, **{}}", "{'k': 1}"),
        ("a | {}", "a"),
        ("({}) | a", "a"),
        ("[f(x) for x in y if False]", "[]"),
        ("a + sum(x for x in [])", "a"),
        ("max((x for x in ()), default=0)", "0"),
        ("max(0, n)", "1"),
        ("a > 1 and False", "False"),
        ("a and False", "a and False"),
        ("n in (1, 2)", "True"),
        ("n in (1, a)", "n in (1, a)"),
        ("a - 0", "a"),
        ("x if is_ours else gone(x)", "x"),
    ],
)
def test_what_comes_to_nothing(expression, left):
    assert fold(f"r = {expression}\n", {"n": 1}, {"gone"}) == f"r = {left}\n"


def test_what_is_empty_throughout_a_function():
    source = """
    def f(x):
        state = {}
        for name in state.items():
            x += name
        held = {**state, "k": x}
        held |= state
        return held
    """
    # something is asked of the one, so that it might be filled
    assert "for name in state.items()" in fold(lines(source), {})
    source = source.replace("state.items()", "state")
    left = 'def f(x):\n    state = {}\n    held = {"k": x}\n    return held\n'
    assert fold(lines(source), {}) == left and "state" not in after(left, unused)


def test_parameters_that_a_function_does_not_read_go_with_their_arguments():
    source = """
    def inner(a, b, c):
        return a + c


    def outer(x, y, z):
        return inner(
            x, y,
            z,
        ) + inner(1, 2, 3)


    def both(x):
        return outer(x, f(x), x)
    """
    left = """
    def inner(a, c):
        return a + c


    def outer(x, y, z):
        return inner(
            x,
            z,
        ) + inner(1, 3)


    def both(x):
        return outer(x, f(x), x)
    """
    # what a call does to find an argument is done
    assert after(source, lambda text: unread_parameters(text, ())) == lines(left)
    assert after(source, lambda text: unread_parameters(text, {"inner"})) == lines(source)
    assert (
        after(source + "\n    g = inner\n", lambda text: unread_parameters(text, ())) == lines(source) + "\ng = inner\n"
    )


def test_types_go_but_where_they_mean_something():
    source = """
    if TYPE_CHECKING:
        from a import B


    @dataclass
    class Side:
        rows: Tensor = None

        def of(
            self,
            x: Tensor,
            *,
            dim: int | None = None,
            name: str = "k",
        ) -> Tensor:
            found: Tensor = x
            return found


    @triton.jit
    def kernel(q, D: tl.constexpr):
        pass
    """
    left = """


    @dataclass
    class Side:
        rows: Tensor = None

        def of(self, x, *, dim=None, name="k"):
            found = x
            return found


    @triton.jit
    def kernel(q, D: tl.constexpr):
        pass
    """
    assert after(source, untyped) == textwrap.dedent(left)[1:]


def test_loops_that_only_gather_what_nothing_reads():
    source = """
    @triton.jit
    def kernel(p, v, n):
        b_o = ()
        for _ in tl.static_range(4):
            b_o = b_o + (tl.zeros((n,), tl.float32),)
        v += n
        return p
    """
    assert after(source, unused) == "@triton.jit\ndef kernel(p, v, n):\n    return p\n"
    # elsewhere it may be a tensor of somebody else's
    assert "v += n" in after(source.replace("@triton.jit", "@other"), unused)


def attributes(source):
    found = Attributes()
    found.note(ast.walk(ast.parse(lines(source))))
    return found


def test_attributes_that_hold_one_value_or_that_nothing_reads():
    source = """
    self.a, self.b = None, x
    self.c: int = 0
    self.c = 0
    self.d = self.e = False
    self.f += 1
    if self.a or self.c or other.d:
        setattr(self, "e", 1)
    """
    found = attributes(source)
    # what others are asked for may be theirs, and a text may be a name
    assert found.constant() == {"a": None, "c": 0}
    assert found.unread() == {"b"}
    assert is_mentioned("is_sliding", [type("Layer", (), {"__module__": "transformers.cache_utils"})])


def test_stores_that_nothing_reads_go():
    source = """
    def f(self, x):
        self.a = self.b = 0
        self.b, self.c = x, 1
        self.b = g(x)
        self.b: int = 1
        return x
    """
    left = "def f(self, x):\n    self.a = 0\n    self.c = 1\n    self.b = g(x)\n    return x\n"
    assert after(source, lambda text: unread(text, {"b"})) == left


@pytest.mark.parametrize(
    "body, passes", [("return super().size", True), ("return super().other", False), ("return self.size", False)]
)
def test_properties_of_the_base_class_are_found_without_another_one(body, passes):
    assert passes_on(ast.parse(f"@property\ndef size(self):\n    {body}\n").body[0]) is passes


FILES = {
    "a.py": '# SPDX\n# hf_kvcache.a 0\n"""A."""\n\nimport torch\n\nfrom .b import one\nfrom .c import two\n\n'
    "X = one(two)\n",
    "b.py": '# SPDX\n# hf_kvcache.b 0\n"""B."""\n\nimport math\n\n\ndef one(x):\n    return math.pi * x\n',
    "c.py": '# SPDX\n# hf_kvcache.c 0\n"""C."""\n\nfrom .d import two as two\n\nY = 1\n',
    "d.py": '# SPDX\n# hf_kvcache.d 0\n"""D."""\n\ntwo = 2\n',
}


def test_files_with_one_importer_are_part_of_it():
    joined = join(FILES, {"c"})
    assert joined.keys() == {"a.py", "c.py", "d.py"}, "renamed imports and kept files stay"
    assert joined["a.py"] == (
        '# SPDX\n# hf_kvcache.a 0\n"""A."""\n\nimport math\n\nimport torch\n\nfrom .c import two\n\n'
        "# hf_kvcache.b\n\n\ndef one(x):\n    return math.pi * x\n\n\nX = one(two)\n"
    )


@pytest.mark.parametrize(
    "change",
    [
        ("b.py", "import math", "from .a import X"),
        ("b.py", "def one", "X = 1\n\n\ndef one"),
        ("b.py", "def one", "register()\n\n\ndef one"),
        ("b.py", "math.pi", "__name__"),
        ("a.py", "import torch", "import other as math"),
        ("a.py", "X = one(two)", "def f():\n    from .b import one\n\n\nX = one(two)"),
        ("a.py", "X =", "try:\n    import triton\nexcept ImportError:\n    raise\n\nX ="),
        ("d.py", "two = 2", "from .b import one\n\ntwo = 2"),
    ],
)
def test_files_whose_names_would_mean_something_else_stay(change):
    name, old, new = change
    assert old in FILES[name]
    assert "b.py" in join(FILES | {name: FILES[name].replace(old, new)}, {"c"})
