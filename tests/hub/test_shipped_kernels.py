"""Triton kernels as they are shipped: run in the interpreter, in a process that it is set up for."""

import os
import subprocess
import sys

import pytest

import hf_kvcache as kv
from hf_kvcache.dmc import Settings
from hf_kvcache.hub.flatten import flatten
from hf_kvcache.hub.recipes import recipe_of

CACHES = {
    "quant": (kv.QuantCache, None),
    "mustafar": (lambda: kv.SparseCache(0.5), None),
    "palu4": (lambda: kv.LowRankCache(bits=4), {"kind": "basis", "rope": "pre", "rotary": 64, "shapes": {}}),
    "dmc": (kv.DMCCache, {"kind": "retrofit", "settings": Settings().to_dict()}),
}

IMPORT = """
import importlib, pathlib, torch
kernels = [p.stem for p in pathlib.Path("{package}").glob("*_triton_kernel.py")]
found = {{name: importlib.import_module("{package}." + name) for name in kernels}}
assert len(found) >= 3, found
"""
QUANT = """
def op(name, backend):
    return getattr(importlib.import_module("{package}.kernels_" + name + "_" + backend), name)

torch.manual_seed(0)
q, (k, v) = torch.randn(2, 6, 1, 64).half(), torch.randn(2, 2, 2, 96, 64).half()
tail_k, tail_v = torch.randn(2, 2, 2, 17, 64).half()
sides = {{}}
for x, axis, size in ((k, "channel", 32), (v, "token", 64)):
    sides[axis] = op("quant_pack", "reference")(x, bits=4, axis=axis, group_size=size)
    packed = op("quant_pack", "triton_kernel")(x, bits=4, axis=axis, group_size=size)
    assert all(torch.equal(a, b) for a, b in zip(packed, sides[axis], strict=True))
knobs = dict(bits=(4, 4), key_axis="channel", scaling=0.125, mask=None, softcap=None)
given = q, sides["channel"], sides["token"], tail_k, tail_v
ours, theirs = (op("quant_attention", backend)(*given, **knobs)[0] for backend in ("triton_kernel", "reference"))
assert (ours - theirs).abs().max() < 2e-3, (ours - theirs).abs().max()
"""


@pytest.mark.parametrize("name", CACHES)
def test_kernels_run_in_the_interpreter(tmp_path, name):
    make, adapter = CACHES[name]
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    for file, text in flatten(recipe_of(make(), adapter), "0").items():
        (folder / file).write_text(text)
    code = (IMPORT + (QUANT if name == "quant" else "")).format(package=name)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
