"""What is imported when: nothing heavy before it is used, and everything that was promised once it is."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import telling

import hf_kvcache as kv
from hf_kvcache import on_import
from hf_kvcache.cli import COMMANDS

HEAVY = "torch", "transformers", "peft", "numpy", "rich", "huggingface_hub"
ROOT = Path(kv.__file__).parent


def python(code, *args, cwd=None):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


HELP = """
import json, sys
from hf_kvcache.cli import main
try:
    main(sys.argv[2:])
except SystemExit as stop:
    assert stop.code == 0
print("HEAVY", json.dumps([name for name in sys.argv[1].split() if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in COMMANDS), ["calibrate", "lowrank"], ["models", "get"]],
    ids=lambda command: " ".join(command) or "none",
)
def test_help_imports_nothing_heavy(command):
    out = python(HELP, " ".join(HEAVY), *command, "--help")
    assert out.startswith("usage: hf-kvcache") and json.loads(out.partition("HEAVY ")[2]) == []


def test_a_mistake_imports_nothing_heavy():
    code = HELP.replace("stop.code == 0", "stop.code == 2")
    for mistake in (["compare", "--dtype", "int8"], ["generate", "--temperature", "-1"], ["dance"]):
        assert json.loads(python(code, " ".join(HEAVY), *mistake).partition("HEAVY ")[2]) == []


def test_the_library_imports_none_of_those_that_it_registers_with():
    code = f"import sys, hf_kvcache\nprint([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "[]"
    # a cache needs transformers, and no PEFT
    code = "import sys, hf_kvcache as kv\nkv.QuantCache(4)\nprint('transformers' in sys.modules, 'peft' in sys.modules)"
    assert python(code).split() == ["True", "False"]


FIRST = [
    "import hf_kvcache",
    "import transformers, hf_kvcache",
    "import hf_kvcache, transformers",
    "from transformers.modeling_utils import PreTrainedModel; import hf_kvcache",
    "import hf_kvcache; from transformers.generation.utils import GenerationMixin",
    "import hf_kvcache, peft",
    "import peft, hf_kvcache",
    "import hf_kvcache; from peft.tuners.lora import LoraConfig",
    "import hf_kvcache.cli",
    "from hf_kvcache import adapters; adapters.register()",
    *(f"import hf_kvcache.{name}" for name in ("compat", "cache", "attention.interface", "dmc")),
    *(f"import hf_kvcache.adapters.{name}" for name in ("lowrank", "retaining_peft", "dmc_peft", "attaching")),
]


# each costs an interpreter of its own
@pytest.mark.parametrize("first", telling(FIRST, *FIRST[6:8], "import hf_kvcache.attention.interface"))
def test_whatever_comes_first_the_names_are_known(first):
    """Also where the first to import transformers or PEFT is one of our own modules, halfway through."""
    code = (
        f"{first}\n"
        "import peft, transformers\n"
        "print('hf_kvcache' in transformers.AttentionInterface().valid_keys())\n"
        "print('hf_kvcache' in transformers.AttentionMaskInterface().valid_keys())\n"
        "print({'KV_LOWRANK', 'RETAINING_HEAD', 'KV_DMC'} <= set(peft.PeftType.__members__))\n"
    )
    assert python(code).split() == ["True"] * 3


def test_a_model_runs_on_the_name_alone():
    """Nothing of the library but its name is used, so its attention is imported by the first call."""
    code = (
        "import hf_kvcache, sys, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)\n"
        "outs, ids = [], torch.arange(12)[None]\n"
        "for name in ('sdpa', 'hf_kvcache'):\n"
        "    torch.manual_seed(0)\n"
        "    config = LlamaConfig(num_attention_heads=2, **sizes)\n"
        "    model = LlamaForCausalLM._from_config(config, attn_implementation=name)\n"
        "    print('hf_kvcache.attention.interface' in sys.modules)\n"
        "    outs.append(model(ids).logits)\n"
        "assert torch.equal(*outs)\n"
        "print('hf_kvcache.attention.interface' in sys.modules)\n"
    )
    assert python(code).split() == ["False", "False", "True"]


def test_every_public_name_is_found_and_no_module_hides_it():
    for name in kv.__all__:
        assert getattr(kv, name) is not None
        # importing a submodule of that name would take the place of what the package gives
        assert not (ROOT / f"{name}.py").exists() and not (ROOT / name).exists(), name
    assert set(kv.__all__) <= set(dir(kv)) and len(set(kv.__all__)) == len(kv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantum'"):
        _ = kv.quantum


def test_tools_see_what_is_imported_lazily():
    """The block for type checkers, `__all__` and the table of homes say the same."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    # tools read the list of the policies where it is written out
    package = seen.pop("*")
    seen |= dict.fromkeys(ast.literal_eval(_assigned(package, "__all__")), package)
    homes = {name: f"hf_kvcache.{home}" for name, home in kv._HOME.items() if home != name}
    assert seen == homes and sorted(seen) == sorted(kv.__all__)


def _assigned(package, name):
    """What a package says that a name is, unread."""
    tree = ast.parse((ROOT.parent / package.replace(".", "/") / "__init__.py").read_text())
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name)
    return value


ALONE = """
import importlib, pkgutil, sys
import torch, transformers, peft
import hf_kvcache
for module in pkgutil.walk_packages(hf_kvcache.__path__, "hf_kvcache."):
    if module.name.startswith(tuple(sys.argv[1:])):
        for name in [name for name in sys.modules if name.partition(".")[0] == "hf_kvcache"]:
            del sys.modules[name]
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.mark.parametrize("first", telling(["hf_kvcache.dmc", "hf_kvcache.po", "hf_kvcache."], "hf_kvcache.dmc"))
def test_whatever_is_imported_first(first):
    """Packages that pass on names import much: no module may need that another one came before it."""
    assert f"{first}" in python(ALONE, first)


# -- when_imported -----------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that can be imported, and is forgotten afterwards."""
    (tmp_path / "kv_late.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "kv_late"
    sys.modules.pop("kv_late", None)


def test_what_waits_for_an_import_runs_within_it_and_leaves_no_trace(package):
    from importlib import reload
    from importlib.util import find_spec

    before, seen = list(sys.meta_path), []
    on_import.when_imported(package, lambda: seen.append(sys.modules[package].VALUE))
    # to ask whether it is there does not import it
    assert find_spec(package).loader.get_source(package) == "VALUE = 7\n" and not seen
    import kv_late

    assert seen == [7] and sys.meta_path == before
    assert kv_late.__loader__ is kv_late.__spec__.loader and type(kv_late.__loader__).__module__.startswith("_frozen")
    reload(kv_late)
    assert seen == [7]
    on_import.when_imported(package, lambda: seen.append("at once"))
    assert seen == [7, "at once"]


def test_a_failure_ends_the_import_and_is_met_again(package):
    def fail():
        raise RuntimeError("not today")

    on_import.when_imported(package, fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            import kv_late  # noqa: F401


def test_finders_may_be_wrapped_by_others(package):
    class Wrapped:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, *args):
            return self.finder.find_spec(*args)

    class Asking:
        def find_spec(self, name, path=None, target=None):
            others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
            return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)

    seen = []
    on_import.when_imported(package, lambda: seen.append("once"))
    sys.meta_path[:] = [Wrapped(finder) for finder in sys.meta_path]
    sys.meta_path.insert(0, Asking())
    import kv_late  # noqa: F401

    assert seen == ["once"]


def test_what_is_not_installed_is_not_found_as_without_us(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    on_import.when_imported("kv_nowhere", lambda: pytest.fail("it is not there"))
    with pytest.raises(ModuleNotFoundError, match="kv_nowhere"):
        import kv_nowhere  # noqa: F401
