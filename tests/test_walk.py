"""The walk of one decode step through one layer, and the order in which the files of the library know each other."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch
from cases import prompt, tiny_model

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "src" / "hf_kvcache").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]

# caches, and what a step may take: calls of our functions, and files that they are in
STEPS = {
    "dense": (kv.KVCache, 25, 13),
    "quant4": (lambda: kv.QuantCache(4), 37, 14),
    "adakv": (lambda: kv.EvictionCache("adakv", budget=128), 60, 21),
}


def calls_of_a_step(cache):
    """Our functions that are called in one layer for one token after 300, by file."""
    model, ids, calls = tiny_model("llama"), prompt(1, 303), []
    stock = model.config._attn_implementation
    model.set_attn_implementation("hf_kvcache")

    def note(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file in ours:
            calls.append(file)

    ours = set(SOURCES)
    attention = model.model.layers[1].self_attn
    try:
        with torch.no_grad():
            for start, stop in ((0, 300), (300, 301), (301, 302)):
                model(ids[:, start:stop], **cache_argument(cache))
            hooks = [
                attention.register_forward_pre_hook(lambda *_: sys.setprofile(note)),
                attention.register_forward_hook(lambda *_: sys.setprofile(None)),
            ]
            model(ids[:, 302:], **cache_argument(cache))
    finally:
        sys.setprofile(None)
        model.set_attn_implementation(stock)
        for hook in hooks:
            hook.remove()
    return calls


@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_is_a_short_walk(name):
    make, most_calls, most_files = STEPS[name]
    calls = calls_of_a_step(make())
    assert 15 < len(calls) <= most_calls
    assert len(set(calls)) <= most_files, sorted(map(os.path.basename, set(calls)))


# -- who knows whom --------------------------------------------------------------------------------------------------

# from what knows nothing of caches to what people run; a file imports from its own line and from those above
ORDER = (
    "lazy on_import warn former_names typed standin batch copying compat accounting transfers",
    "hf_layers shards sharded_model",
    "rope rope_of_call rotary_embedding rope_of_model kernels",
    "codecs stores registry rerotation adapters.errors adapters.base_weights adapters.modules",
    "layer_context identity fingerprint view handed expanding offloading saving text_positions row_shapes "
    "layer_settings",
    "policies layer_contract cache_contract cache_options per_layer attention.known",
    "layer stateful cache",
    "attention",
    "former_files described manifest hf_layer_entries restoring persist pickling cache_config long_prompts second_pass "
    "hub.spec hub.modeling_mixin hub.adapter_modules",
    "adapters dmc",
    "presets models",
    "hub bench calibration eval",
    "tuning",
    "trainers commands cli lm_eval",
)


def imports_of(path):
    """Modules of ours that a file imports when it is loaded; types and what functions import do not count."""
    found, todo = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                continue
            if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_kvcache":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in MODULES else node.module)
            todo.append(node)
    return found


def module_name(path):
    base = ROOT / "src" if ROOT / "src" in path.parents else ROOT
    parts = list(path.relative_to(base).with_suffix("").parts)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "hf_kvcache" else ["hf_kvcache", *parts])


MODULES = {module_name(path): path for path in SOURCES}
ARROWS = {name: imports_of(path) for name, path in MODULES.items()}


def test_imports_run_in_no_circle():
    left = {name: set(to) & ARROWS.keys() for name, to in ARROWS.items()}
    while ready := [name for name, to in left.items() if not to & left.keys() - {name}]:
        for name in ready:
            del left[name]
    assert not left


def level(module):
    """The line of `ORDER` with the longest name that a module has."""
    lines = {name: i for i, names in enumerate(ORDER) for name in names.split()}
    parts = module.split(".")[1:]
    return next((lines[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in lines), None)


def test_no_import_rises():
    # the package itself, and packages that pass on names, stand for what they pass on
    passing = {"hf_kvcache"} | {name for name, path in MODULES.items() if path.name == "__init__.py"}
    rising = {
        (name, to)
        for name, targets in ARROWS.items()
        for to in targets
        if name not in passing and to != "hf_kvcache" and level(to) > level(name)
    }
    assert not rising


def test_every_file_has_its_place():
    assert not [name for name in MODULES if name != "hf_kvcache" and level(name) is None]


# -- what one can read -----------------------------------------------------------------------------------------------


def test_files_are_short():
    most = {"cache.py": 260, "layer.py": 320}
    for path in SOURCES:
        n = len(path.read_text(encoding="utf-8").splitlines())
        allowed = most.get(path.name, 400) if path.parent.name == "hf_kvcache" else 400
        assert n <= allowed, (path.name, n)
    hub = [path for path in SOURCES if path.parent.name == "hub"]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in hub) <= 1500
