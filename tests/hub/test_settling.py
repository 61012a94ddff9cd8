"""What a repository does not need of functions and files: types, and files that only one other imports."""

import textwrap

import pytest

from hf_kvcache.hub.join import join
from hf_kvcache.hub.text import Text, until_done
from hf_kvcache.hub.untyped import untyped


def lines(text):
    return textwrap.dedent(text).lstrip("\n")


def after(source, find):
    """A text after all that can be found in it."""
    source = until_done(Text(lines(source).encode()), find).text.decode()
    compile(source, "after", "exec")
    return source


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


def test_signatures_that_are_too_long_have_a_parameter_on_each_line():
    names = [f"a_parameter_{i}=(1, {i})" for i in range(8)]
    left = after(f"def f({', '.join(names)}, **more) -> int:\n    return 1\n", untyped)
    assert left == "def f(\n" + "".join(f"    {name},\n" for name in [*names, "**more"]) + "):\n    return 1\n"


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
