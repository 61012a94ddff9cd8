"""What a repository ships is the library's own text: every function, but where it speaks of what is left out."""

import ast
import re

import pytest
from rooms import telling
from test_export import FAMILIES, SHORT, plain, repositories  # noqa: F401

from hf_kvcache import compat
from hf_kvcache.hub.export import _adapter
from hf_kvcache.hub.flatten import _BY_NAME
from hf_kvcache.hub.library import where
from hf_kvcache.hub.recipes import recipe_of


class _Bare(ast.NodeTransformer):
    """Without types, docstrings and imports."""

    def visit_FunctionDef(self, node):
        node.returns = None
        node.body = node.body[ast.get_docstring(node) is not None :]
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        return node if node.value is None else self.generic_visit(ast.Assign([node.target], node.value, lineno=0))

    def visit_ImportFrom(self, node):
        return ast.Pass()

    visit_Import = visit_ImportFrom


def functions(source):
    """Functions and methods by name, as trees without what says nothing."""
    found, tree = {}, ast.parse(source)
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name: f for f in inner if isinstance(f, ast.FunctionDef)}
    return {name: ast.dump(_Bare().visit(f)) for name, f in found.items()}


def of_library(module):
    source = where(module).read_text()
    for old, new in _BY_NAME.items():
        source = source.replace(old, new)
    return functions(source)


@pytest.fixture(scope="module", params=telling(FAMILIES, *SHORT))
def shipped(request, repositories):  # noqa: F811
    """Texts of the files of a repository, and the names of what it does without."""
    prepare, make = FAMILIES[request.param]
    model, cache = prepare(plain()), make()
    absent = recipe_of(cache, _adapter(model, cache)[0], model.config).absent
    files = [file for file in (repositories / request.param).glob("*.py") if not file.name.startswith("modeling_")]
    return [file.read_text() for file in files], {path.rpartition(":")[2].rpartition(".")[2] for path in absent}


def test_every_function_is_that_of_the_library(shipped):
    files, absent = shipped
    n_same = 0
    for source in files:
        theirs = {}
        for module in re.findall(r"^# (hf_kvcache[\w.]*)", source, re.MULTILINE):
            theirs |= of_library(module)
        for name, tree in functions(source).items():
            is_explained = any(f"'{left_out}'" in theirs[name] for left_out in absent)
            assert tree == theirs[name] or is_explained, name
            n_same += tree == theirs[name]
    assert n_same > 200


def test_compat_finds_names_where_it_runs(shipped):
    # nothing of the release that wrote the repository is in it
    (source,) = [source for source in shipped[0] if re.search("^CACHE_NAME = ", source, re.MULTILINE)]
    ours = {ast.unparse(s) for s in ast.parse(where("hf_kvcache.compat").read_text()).body if isinstance(s, ast.Assign)}
    asked = [
        ast.unparse(s) for s in ast.parse(source).body if "CACHE_NAME" in ast.unparse(s) and isinstance(s, ast.Assign)
    ]
    assert len(asked) == 2 and set(asked) <= ours
    # these are the same whatever is left out
    whole = ("eager_attention", "cache_argument", "given_cache", "named_cache")
    theirs, found = of_library(compat.__name__), functions(source)
    assert {name: found[name] for name in whole} == {name: theirs[name] for name in whole}
