"""What of classes and functions an exported repository needs, by those that there are instances of."""

import importlib
import sys
import textwrap

import pytest
from test_export import FAMILIES

from hf_kvcache.hub.flatten import Recipe, flatten
from hf_kvcache.hub.library import Module
from hf_kvcache.hub.members import is_mentioned
from hf_kvcache.hub.recipes import recipe_of
from hf_kvcache.hub.shake import Shaken

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
    return {f"{cls}.{name}" for _, cls, name in found.members}


def test_what_every_instance_overrides_is_not_reached(tmp_path, monkeypatch):
    members = shaken(tmp_path, monkeypatch, CLASSES, "make")
    assert members == {"Base.__init__", "Base.fill", "Derived.fill", "Derived.size", "Derived.other"}


def test_instances_of_the_base_class_itself_need_its_members(tmp_path, monkeypatch):
    members = shaken(tmp_path, monkeypatch, CLASSES, "make_both")
    assert members >= {"Base.size", "Base.other"}


def test_members_that_a_root_names_do_not_say_that_there_are_instances(tmp_path, monkeypatch):
    members = shaken(tmp_path, monkeypatch, CLASSES, "make", "Base.size")
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
    members = shaken(tmp_path, monkeypatch, source, "make")
    assert members == {"A.__init__"}


def test_a_name_that_is_bound_twice_is_refused():
    source = "from hf_kvcache import cache as a\n\n\ndef f():\n    from hf_kvcache import layer as a\n"
    with pytest.raises(ValueError, match="binds a to"):
        Module("m", source)


def test_what_is_absent_has_its_name_for_itself():
    recipe = Recipe(("hf_kvcache.stores.buffer:RowBuffer",), absent=("hf_kvcache.layer:KVLayer.append",))
    with pytest.raises(ValueError, match="RowBuffer.append would be, too"):
        flatten(recipe, "0")


def test_other_libraries_may_ask_for_what_they_speak_of():
    assert is_mentioned("is_sliding", [type("Layer", (), {"__module__": "transformers.cache_utils"})])
    assert not is_mentioned("no_such_name", [type("Layer", (), {"__module__": "transformers.cache_utils"})])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_is_there_to_be_left_out(name):
    # an entry that the library has no more would leave nothing out, in silence
    recipe = recipe_of(FAMILIES[name][1]())
    for path in {*recipe.absent, *recipe.dropped}:
        module, _, names = path.partition(":")
        found = importlib.import_module(module)
        for part in names.split("."):
            found = getattr(found, part, None) or importlib.import_module(f"{module}.{part}")
