"""What of classes and functions an exported repository needs, by those that there are instances of."""

import ast
import sys
import textwrap

import pytest

from hf_kvcache.hub.flatten import Recipe, flatten
from hf_kvcache.hub.fold import fold, only_checks, returned
from hf_kvcache.hub.library import Module
from hf_kvcache.hub.shake import Shaken
from hf_kvcache.hub.text import Text
from hf_kvcache.hub.unused import unused
from hf_kvcache.hub.values import SOMETHING, Trivial

CLASSES = """
class Base:
    def __init__(self):
        self.fill()

    def fill(self):
        return self.size()

    def size(self):
        return 1

    def other(self):
        return 2


class Derived(Base):
    def fill(self):
        return super().fill()

    def size(self):
        return 3

    def other(self):
        return 4


def is_base(x):
    return isinstance(x, Base)


def make():
    x = Derived()
    is_base(x)
    return x.other()


def make_both():
    return Base(), make()
"""


def shaken(tmp_path, monkeypatch, source, *roots):
    """Members that are reached in a module with this text."""
    (tmp_path / "hf_kvcache_here.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hf_kvcache_here", raising=False)
    found = Shaken(lambda name: Module(name, source), [f"hf_kvcache_here:{root}" for root in roots])
    return {f"{cls}.{name}" for _, cls, name in found.members}, found


def test_what_every_instance_overrides_is_not_reached(tmp_path, monkeypatch):
    members, _ = shaken(tmp_path, monkeypatch, CLASSES, "make")
    assert members == {"Base.__init__", "Base.fill", "Derived.fill", "Derived.size", "Derived.other"}


def test_instances_of_the_base_class_itself_need_its_members(tmp_path, monkeypatch):
    members, _ = shaken(tmp_path, monkeypatch, CLASSES, "make_both")
    assert members >= {"Base.size", "Base.other"}


def test_members_that_a_root_names_do_not_say_that_there_are_instances(tmp_path, monkeypatch):
    members, _ = shaken(tmp_path, monkeypatch, CLASSES, "make", "Base.size")
    assert "Base.size" not in members


def test_only_what_is_read_is_a_use(tmp_path, monkeypatch):
    source = """
class A:
    def __init__(self):
        self.held = 1

    @property
    def other(self):
        return 1


class B:
    def held(self):
        return 1


def make():
    return A(), B()
"""
    members, _ = shaken(tmp_path, monkeypatch, source, "make")
    assert members == {"A.__init__"}


def test_functions_that_come_to_a_constant_or_to_their_argument(tmp_path, monkeypatch):
    source = """
def is_on(x):
    return True


def same(x):
    return x


def more(x, y=1):
    return x


def run(x):
    return same(x) if is_on(x) else more(x)
"""
    _, found = shaken(tmp_path, monkeypatch, source, "run")
    assert found.trivial() == Trivial({"is_on": True}, frozenset({"same"}))
    left = fold(source, {}, (), found.trivial())
    assert "def run(x):\n    return x\n" in left


@pytest.mark.parametrize(
    "expression, left",
    [
        ("self.policy is None", "False"),
        ("self.policy is not None", "True"),
        ("self.policy == 0", "False"),
        ("self.policy == 1", "self.policy == 1"),
        ("self.policy or x", "self.policy or x"),
        ("a if self.policy else b", "a"),
        ("0 < n < 2", "True"),
        ("0 < n < m", "0 < n < m"),
        ("self.format.startswith('int')", "True"),
        ("format", "format"),
        ("same(x)(y)", "x(y)"),
        ("same(x + y) * 2", "(x + y) * 2"),
        ("same(x, y)", "same(x, y)"),
    ],
)
def test_what_is_known_in_part(expression, left):
    facts = {"policy": SOMETHING, "n": 1, ".format": "int"}
    assert fold(f"r = {expression}\n", facts, (), Trivial({}, frozenset({"same"}))) == f"r = {left}\n"


def test_loops_over_nothing_go():
    source = "def f(x):\n    for i in tl.static_range(GROUPS if ON else 0):\n        x += i\n    return x\n"
    assert fold(source, {"ON": False}) == "def f(x):\n    return x\n"
    assert fold(source, {"ON": True, "GROUPS": 2}) != "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "line, left",
    [
        ("a = x.y", ""),
        ("a, b = x.y, 1", "b = 1"),
        ("a: int = 3", ""),
        ("a = f(x)", "a = f(x)"),
        ("a, b = f(x), 1", "a, b = f(x), 1"),
        ("a = tl.zeros((4,), tl.float32)", ""),
    ],
)
def test_names_that_nothing_reads(line, left):
    text = Text(f"def g(x):\n    {line}\n    return b\n".encode())
    for edit in unused(text):
        text = Text(text.text[: edit.start] + edit.text + text.text[edit.stop :])
    assert text.text.decode() == "def g(x):\n" + (f"    {left}\n" if left else "") + "    return b\n"


@pytest.mark.parametrize(
    "body, is_check",
    [
        ("if self.bits > 8:\n        raise ValueError", True),
        ("self.bits = 8", False),
        ("object.__setattr__(self, 'bits', 8)", False),
    ],
)
def test_checks_of_values(body, is_check):
    function = ast.parse(f"def __post_init__(self):\n    {body}\n").body[0]
    assert only_checks(function) is is_check
    assert returned(function) is None


def test_a_name_that_is_bound_twice_is_refused():
    source = "from hf_kvcache import cache as a\n\n\ndef f():\n    from hf_kvcache import layer as a\n"
    with pytest.raises(ValueError, match="binds a to"):
        Module("m", source)


def test_what_is_absent_has_its_name_for_itself():
    recipe = Recipe(("hf_kvcache.stores.buffer:RowBuffer",), absent=("hf_kvcache.layer:KVLayer.append",))
    with pytest.raises(ValueError, match="RowBuffer.append would be, too"):
        flatten(recipe, "0")
