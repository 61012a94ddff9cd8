"""Modules of a package as files of one folder: which ones, and what becomes of their imports."""

import importlib
import sys
import textwrap

import pytest

from hf_kvcache.hub.flatten import HEADER, closure, files_of, flat, rewritten

SHIPPED = {"hf_kvcache.warn", "hf_kvcache.rope", "hf_kvcache.stores.buffer", "hf_kvcache.kernels.native"}


def after(source):
    source = textwrap.dedent(source).lstrip("\n")
    left = rewritten(source, SHIPPED)
    compile(left, "after", "exec")
    assert len(left.splitlines()) >= len(source.splitlines())
    return left


@pytest.mark.parametrize(
    "line, left",
    [
        ("from hf_kvcache.warn import warn_once", "from .warn import warn_once"),
        (
            "from hf_kvcache.stores.buffer import RowBuffer as R  # why",
            "from .stores_buffer import RowBuffer as R  # why",
        ),
        ("from hf_kvcache import rope, warn", "from . import rope, warn"),
        ("from hf_kvcache.kernels import native", "from . import kernels_native as native"),
        ("from hf_kvcache.kernels import native as cpp  # noqa", "from . import kernels_native as cpp  # noqa"),
        ("from hf_kvcache import warn as warn", "from . import warn"),
        # what has not come along
        ("from hf_kvcache.persist import save, load", "from .hub_not_shipped import save, load"),
        ("from hf_kvcache import persist as files", "from .hub_not_shipped import persist as files"),
        ("from hf_kvcache import persist, warn", "from .hub_not_shipped import persist\nfrom . import warn"),
        # others
        ("from hf_kvcache_of_others import x", "from hf_kvcache_of_others import x"),
        ("import torch", "import torch"),
    ],
)
def test_imports(line, left):
    assert after(line + "\n") == left + "\n"
    # and in functions
    assert after(f"def f():\n    {line}\n") == "def f():\n" + textwrap.indent(left, "    ") + "\n"


def test_long_imports_keep_their_lines_and_text_beyond_ascii_its_place():
    source = """
    '''→ from hf_kvcache.warn import x'''
    from hf_kvcache.rope import (
        Rope,  # why
        rotate,
    )

    x = "ü"; y = 1
    from hf_kvcache.warn import warn_once
    """
    left = textwrap.dedent(source).lstrip("\n").replace("hf_kvcache.rope", ".rope")
    assert after(source) == ".warn".join(left.rsplit("hf_kvcache.warn", 1))


def test_imports_of_triton_may_fail():
    source = """
    import torch
    import triton
    import triton.language as tl
    from torch import nn

    from hf_kvcache.warn import (
        warn_once,
    )
    """
    left = """
    import torch

    try:
        import triton
        import triton.language as tl
    except ImportError:  # PyTorch serves
        raise
    from torch import nn

    from .warn import (
        warn_once,
    )
    """
    assert after(source) == textwrap.dedent(left).lstrip("\n")


FILES = {
    "hf_kvcache/a.py": """
        from typing import TYPE_CHECKING

        from hf_kvcache.b import one

        if TYPE_CHECKING:
            from hf_kvcache.types import Type


        def more():
            from hf_kvcache import persist
            return persist


        def also():
            from hf_kvcache.c import two
            return one, two
        """,
    "hf_kvcache/b.py": "from hf_kvcache import d\n\none = d.three\n",
    "hf_kvcache/c.py": "from hf_kvcache.b import one\n\ntwo = 2\n",
    "hf_kvcache/d.py": "three = 3\n",
    "hf_kvcache/types.py": "Type = int\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Modules beside those of the library."""
    for name, source in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source).lstrip("\n"))
    package = importlib.import_module("hf_kvcache")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "hf_kvcache")])


def test_what_is_imported_comes_along_and_what_is_optional_says_where_it_is(package, tmp_path, monkeypatch):
    assert closure(["hf_kvcache.a"]) == {f"hf_kvcache.{name}" for name in "abcd"}
    files = files_of(["hf_kvcache.a"], "0")
    assert files.keys() == {"a.py", "b.py", "c.py", "d.py", "hub_not_shipped.py"}
    assert files["a.py"].startswith(HEADER.format(module="hf_kvcache.a", version="0"))
    folder = tmp_path / "a_repository"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    shipped = importlib.import_module("a_repository.a")
    assert shipped.also() == (3, 2)
    with pytest.raises(ImportError, match="persist is a part of hf_kvcache .* pip install hf_kvcache"):
        shipped.more()
    for name in list(sys.modules):
        if name.startswith("a_repository"):
            del sys.modules[name]


def test_roots_that_are_optional_come_along():
    with_files = closure(["hf_kvcache.policies.wrapper", "hf_kvcache.registry"])
    assert with_files - closure(["hf_kvcache.policies.wrapper"]) == {"hf_kvcache.registry"}


def test_ops_come_with_what_their_dispatcher_looks_for():
    found = closure(["hf_kvcache.kernels.merge_step"])
    assert {f"hf_kvcache.kernels.merge_step.{name}" for name in ("reference", "triton_kernel")} <= found
    assert not any(name.endswith(("native", "gluon_kernel")) for name in found)


def test_two_modules_are_never_one_file(package, tmp_path):
    (tmp_path / "hf_kvcache" / "stores_buffer.py").touch()
    assert flat("hf_kvcache.stores_buffer") == flat("hf_kvcache.stores.buffer")
    with pytest.raises(ValueError, match="stores_buffer.py would be two modules"):
        files_of(["hf_kvcache.stores.buffer", "hf_kvcache.stores_buffer"], "0")
