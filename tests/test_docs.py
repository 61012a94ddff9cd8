"""Every Python snippet of README.md and docs/ runs as it stands.

The snippets of a page share their names, in order, so a page runs from its top. Where one needs the network, a GPU or
several processes, `<!-- needs: ... -->` stands in front of it: it is compiled, its names and arguments are looked up.
A `print(...)  # value` has to print that value. Commands are parsed, up to what a trainer reads by itself.
"""

import ast
import builtins
import importlib
import inspect
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from hf_kvcache.cli import build_parser
from hf_kvcache.compat import CACHE_NAME

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
NEEDS = {"network", "GPU", "several processes"}


def snippets(path):
    """What every snippet of a page needs, or None, and its code, on the lines that it has in the page."""
    text = path.read_text(encoding="utf-8")
    for match in SNIPPET.finditer(text):
        yield match["needs"], "\n" * text.count("\n", 0, match.start("code")) + match["code"]


class OlderName(ast.NodeTransformer):
    """Calls of `generate` with the name that this release of transformers has for its cache."""

    def visit_Call(self, call):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "generate":
            for keyword in call.keywords:
                keyword.arg = CACHE_NAME if keyword.arg == "cache" else keyword.arg
        return self.generic_visit(call)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_snippets_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": path.stem}
    for needs, code in snippets(path):
        assert needs is None or needs in NEEDS, needs
        tree = OlderName().visit(ast.parse(code, str(path)))
        if needs is None:
            with warnings.catch_warnings():
                # a basis that is fitted to the prompt is what some of them show
                warnings.filterwarnings("ignore", message=".*fitted to the prompt")
                exec(compile(tree, str(path), "exec"), names)
            printed = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE)
            assert capsys.readouterr().out.splitlines() == printed
        else:
            check(tree, names)


def check(tree, known):
    """Look up the names of a snippet that cannot run here, and the arguments of what it calls."""
    compile(tree, "snippet", "exec")
    found = dict(known)
    bound = {name.id for name in ast.walk(tree) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                found[alias.asname or alias.name.split(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.split(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            found |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id in found or node.id in bound or hasattr(builtins, node.id), f"no {node.id}"
        elif isinstance(node, ast.Attribute):
            resolved(node, found, bound)
        elif isinstance(node, ast.Call):
            function = resolved(node.func, found, bound)
            if function is not None:
                # raises TypeError for an argument that it has not
                inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


def resolved(node, found, bound):
    """The object that a dotted name stands for, or None where only running tells."""
    if isinstance(node, ast.Name):
        return None if node.id in bound else found.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, found, bound)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import hf_kvcache as kv\nkv.NoCache()", AttributeError),
        ("from hf_kvcache import NoCache", AttributeError),
        ("import hf_kvcache as kv\nkv.QuantCache(bit=4)", None),
        ("import hf_kvcache as kv\nkv.prefill(1, 2, 3, chunks=4)", TypeError),
        ("import hf_kvcache as kv\nkv.QuantCache(bits=four)", AssertionError),
    ],
)
def test_what_cannot_run_is_looked_up(code, error):
    tree = ast.parse(code)
    if error is None:
        check(tree, {})
    else:
        with pytest.raises(error):
            check(tree, {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_are_understood(path):
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("hf-kvcache"):
                # a wrong option ends the process
                build_parser().parse_args(shlex.split(line, comments=True)[1:])
