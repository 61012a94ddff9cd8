"""What a repository ships are the library's own modules, whole: exported file == rewrite of the library's file."""

import ast
import re
from functools import cache

import pytest
from cases import CASES
from test_export import FAMILIES
from transformers import LlamaConfig

import hf_kvcache as kv
from hf_kvcache.hub.flatten import HEADER, OPTIONAL, closure, files_of, flat, rewritten, source_of, where
from hf_kvcache.hub.kernel_repo import WITH, sources
from hf_kvcache.hub.recipes import roots_of

# how the model carries what the cache of a family goes by
CARRIED = {"palu": "basis", "palu4": "basis", "locret": "heads", "dmc": "retrofit", "dms": "retrofit"}


def roots(name):
    return roots_of(FAMILIES[name][1](), {"kind": CARRIED[name]} if name in CARRIED else None, LlamaConfig())


def of_an_op(op):
    files = sources(op, kv.__version__)
    # the list of what it offers
    del files["__init__.py"]
    return files


def module_of(text):
    """The module that the first lines name."""
    head = r"# SPDX-License-Identifier: Apache-2.0\n# (hf_kvcache[\w.]*), as in hf_kvcache [\d.]+ but for its imports\n"
    return re.match(head, text).group(1)


def without_imports(text):
    """Lines of a text that are neither imports nor say that one may fail, with nothing between them."""
    gone = set()
    for node in ast.walk(ast.parse(text)):
        is_guard = isinstance(node, ast.Try) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in node.body)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or is_guard and len(node.handlers) == 1:
            gone |= set(range(node.lineno, node.end_lineno + 1))
    return [line for i, line in enumerate(text.splitlines(), 1) if i not in gone and line]


def check(files):
    assert files
    modules = {module_of(text) for text in files.values()}
    assert {f"{flat(module)}.py" for module in modules} == files.keys()
    for name, text in files.items():
        module = module_of(text)
        header = HEADER.format(module=module, version=kv.__version__)
        assert name == f"{flat(module)}.py" and text == header + rewritten(source_of(module), modules)
        assert lines_of(text) == source_lines(module), name
        expected = {
            (here, file, there) if f"{file}.py" in files else (here, "hub_not_shipped", called)
            for here, file, there, called in meant(module)
        }
        assert taken(text) == expected, name
        for _, file, of in taken(text):
            assert f"{file}.py" in files, (name, file)
            assert of is None or file == "hub_not_shipped" or of in bound(files[f"{file}.py"]), (name, file, of)


@cache
def lines_of(text):
    return without_imports(text)[2:]


@cache
def source_lines(module):
    return without_imports(source_of(module))


@cache
def taken(text):
    """What a file imports from files beside it: (name here, file, name there or None for the file itself)."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                of = (node.module, alias.name) if node.module else (alias.name, None)
                found.add((alias.asname or alias.name, *of))
    return found


@cache
def meant(module):
    """The same of the library's module, and what it is called there."""
    found = set()
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.ImportFrom) and where(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                of = (flat(inner), None) if where(inner) else (flat(node.module), alias.name)
                found.add((alias.asname or alias.name, *of, alias.name))
    return found


@cache
def bound(text):
    """Names that a file has."""
    found = set()
    for statement in ast.parse(text).body:
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
        found.add(getattr(statement, "name", None))
    return found


@pytest.mark.parametrize("kind", [*FAMILIES, "for any model"])
def test_files_are_the_librarys_but_for_their_imports(kind):
    files = files_of(roots_of(kv.QuantCache(4)) if kind == "for any model" else roots(kind), kv.__version__)
    check(files)
    # a package that passes on names would bring all that there is
    assert not files.keys() & {"codecs.py", "policies.py", "stores.py", "adapters.py", "dmc.py", "hf_kvcache.py"}


def test_every_cache_of_the_table_has_files():
    for needed in {frozenset(roots_of(case.make())) for case in CASES}:
        check(files_of(needed, kv.__version__))


@pytest.mark.parametrize("op", WITH)
def test_files_of_kernels_are_the_librarys_but_for_their_imports(op):
    check(of_an_op(op))


def test_what_is_optional_is_there_to_be_left_out():
    # an entry that the library has no more, or imports in any case, would leave nothing out, in silence
    everything = closure([*OPTIONAL, "hf_kvcache.hub.modeling_mixin", "hf_kvcache.policies.wrapper"])
    lazily = {
        f"{node.module}.{alias.name}" if where(f"{node.module}.{alias.name}") else node.module
        for module in everything
        for function in ast.walk(ast.parse(source_of(module)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert all(where(module) for module in OPTIONAL)
    # of these the cache knows, however it imports them
    assert OPTIONAL - {"hf_kvcache.persist", "hf_kvcache.pickling"} <= lazily
