"""Every tensor that a cache keeps alive is in its `nbytes`, found by walking what it holds and not by asking it."""

import types
import weakref

import pytest
import torch
from cases import CASES, KNOBS, prompt, replay, tiny_model
from transformers import PretrainedConfig

import hf_kvcache as kv

NO_BYTES = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device, types.ModuleType)
NOT_OURS = (torch.nn.Module, PretrainedConfig, weakref.ref, types.FunctionType, types.BuiltinFunctionType)


def tensors_in(*roots):
    """Every tensor that can be reached from the roots, without models and configs."""
    found, seen, todo = [], set(), list(roots)
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, NO_BYTES + NOT_OURS):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (dict, weakref.WeakValueDictionary, types.MappingProxyType)):
            todo += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set, frozenset)):
            todo += x
        elif isinstance(x, types.MethodType):
            todo.append(x.__self__)
        else:
            slots = [name for cls in type(x).__mro__ for name in getattr(cls, "__slots__", ())]
            todo += list(getattr(x, "__dict__", {}).values()) + [getattr(x, name, None) for name in slots]
    return found


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() or t.nbytes}


def assert_all_is_counted(cache, model, *others):
    """`nbytes` is the sum over all storages that are neither the model's nor in `others`."""
    theirs = storages([*model.parameters(), *model.buffers(), *tensors_in(*others)])
    ours = {at: n for at, n in storages(tensors_in(cache)).items() if at not in theirs}
    assert cache.nbytes == sum(ours.values())


RAGGED = {
    "expected-adakv": lambda: kv.EvictionCache("adakv", budget=42, scorer="expected_attention", window=4, **KNOBS),
    "expected-merge": lambda: kv.EvictionCache("expected_attention", budget=24, merge=True, **KNOBS),
    "adakv-sparse-quant8": lambda: kv.SparseCache(
        0.5, bits=8, window=4, n_sink=0, policy=kv.AdaKV(budget=42, scorer="keydiff", **KNOBS)
    ),
    "lowrank-fitted": lambda: kv.LowRankCache(0.5, window=4),
    "lowrank-fitted-quant4": lambda: kv.LowRankCache(0.5, bits=4, window=4),
    "lowrank-shared": lambda: kv.LowRankCache(0.5, share_layers=2, window=4),
}
ROWS = {case.id: case.make for case in CASES} | RAGGED


@pytest.mark.parametrize("name", ROWS)
def test_every_tensor_is_counted(name):
    model, cache = tiny_model(), ROWS[name]()
    firsts = [getattr(codec, "first", codec) for codec in cache.codec or ()]
    bases = [codec.bases for codec in firsts if getattr(codec, "bases", None) is not None]
    for sizes in ([90], [1] * 5, [30], [1] * 8):
        replay(model, cache, prompt(2, sum(sizes), seed=len(sizes)), sizes)
        assert_all_is_counted(cache, model, *bases)
    cache.batch_repeat_interleave(2)
    assert_all_is_counted(cache, model, *bases)
    cache.reset()
    assert_all_is_counted(cache, model, *bases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["streaming", "adakv"])
def test_keys_that_are_kept_twice_are_counted_twice(name, dtype):
    model = tiny_model(dtype=dtype)
    cache = kv.EvictionCache(name, budget=48, window=4, rerotate_keys=True, **KNOBS)
    replay(model, cache, prompt(2, 90), [60] + [1] * 30)
    assert_all_is_counted(cache, model)
    held = {name for layer in cache.layers for name in layer.store.dense.tensors}
    assert ("original" in held) == (dtype == torch.bfloat16)


def test_the_walk_finds_what_is_not_counted():
    """The test above can fail: a tensor that somebody hangs on a layer is found."""
    model, cache = tiny_model(), kv.KVCache()
    replay(model, cache, prompt(1, 9), [9])
    cache.layers[0].hidden = {"place": [torch.zeros(3)]}
    with pytest.raises(AssertionError):
        assert_all_is_counted(cache, model)
