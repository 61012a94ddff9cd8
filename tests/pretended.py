"""Tensors that pretend to be on a CUDA device, and a count of what would make the host wait for it.

A `Pretended` tensor says `device="cuda:0"` and computes on the CPU. Whatever needs a value of it on the host, such as
`.item()`, `.cpu()` or boolean indices, and every copy that blocks, is counted with the line that asked for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from cases import cache_argument, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hf_kvcache import kernels, transfers

aten = torch.ops.aten
WITH_KERNELS = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/triton_kernel.py")} | {
    path.parent.name for path in (Path(__file__).parents[1] / "kernels").glob("*/triton_kernel.py")
}
DEVICE = torch.device("cuda", 0)
# their result has as many rows as there are values of some kind: the host has to know
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Pretended(torch.Tensor):
    """A tensor of the CPU that says it is elsewhere."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    def __init__(self, held):
        pass

    # PyTorch itself sees "meta", for which it looks for no driver
    device, is_cuda, is_meta = DEVICE, True, False

    def __repr__(self):
        return f"Pretended({self.held})"

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of `pretending()`")


class _Pretending(TorchDispatchMode):
    """Runs every op on what `Pretended` tensors hold; see `pretending`."""

    def __init__(self, waits: Counter):
        super().__init__()
        # under the key of fake tensors PyTorch does not look for a device that it was not built for
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, spec = tree_flatten((args, kwargs or {}))
        there = {id(x.held): x for x in flat if isinstance(x, Pretended)}
        target = (kwargs or {}).get("device")
        if not there and (target is None or not _is_there(target)):
            return func(*args, **(kwargs or {}))
        self._look(func, args, kwargs or {}, there)
        flat = [x.held if isinstance(x, Pretended) else torch.device("cpu") if _is_there(x) else x for x in flat]
        args, kwargs = tree_unflatten(flat, spec)
        found = func(*args, **kwargs)
        if func is aten._to_copy.default and target is not None and not _is_there(target):
            return found
        if func is aten.copy_.default:
            return there.get(id(found), found)
        return tree_map(lambda x: there.get(id(x), Pretended(x)) if isinstance(x, torch.Tensor) else x, found)

    def _look(self, func, args, kwargs, there) -> None:
        """Count what the host would wait for, and refuse what a device would."""
        if func in VALUES or func in SIZED_BY_VALUES:
            self._count(func)
        elif func in INDEXED:
            for index in filter(None.__ne__, args[1]):
                if index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Pretended) and index.dim():
                    self._count(func)
        elif func in (aten._to_copy.default, aten.copy_.default):
            is_elsewhere = [isinstance(x, Pretended) for x in args[:2] if isinstance(x, torch.Tensor)]
            if func is aten._to_copy.default:
                is_elsewhere.append(_is_there(kwargs.get("device", args[0].device)))
            is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if len(set(is_elsewhere)) > 1 and not is_asynchronous:
                self._count(func)
        else:
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            if there and any(x.dim() and not isinstance(x, Pretended) for x in tensors):
                raise RuntimeError(f"{func} mixes tensors of two devices")

    def _count(self, func) -> None:
        ours = [f for f in traceback.extract_stack() if "hf_kvcache" in f.filename or "/src/" in f.filename]
        where = f"{ours[-1].filename.rpartition('hf_kvcache/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"
        self.waits[f"{func} at {where}"] += 1


def _is_there(x) -> bool:
    return isinstance(x, torch.device) and x.type in ("cuda", "meta")


class _Launches(dict):
    """Stands for the table of ops that can run: ops that have a Triton kernel run the reference on what tensors hold.

    Kernels do not make the host wait; what their obstacles refuse runs on the reference and is counted, as on a device.
    """

    def get(self, key, default=None):
        op, device = key
        if device.type != "cuda":
            return super().get(key, default)
        real = kernels._module(op, "triton") if op in WITH_KERNELS else None
        return real and _Launch(real, kernels._module(op, "reference"))


class _Launch:
    def __init__(self, real, reference):
        self.real, self.reference = real, reference

    def __getattr__(self, name):
        if name == "obstacle":
            return getattr(self.real, name)

        def launch(*args, **kwargs):
            flat, spec = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten([x.held if isinstance(x, Pretended) else x for x in flat], spec)
            found = getattr(self.reference, name)(*args, **kwargs)
            return tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, found)

        return launch


class _Event:
    """What has happened when it is asked for the second time."""

    def __init__(self):
        self.n_asked = 0

    def query(self) -> bool:
        self.n_asked += 1
        return self.n_asked > 1


@contextmanager
def pretending(monkeypatch):
    """Within, ops of `Pretended` tensors run; gives a count of waits, by op and line."""
    waits: Counter = Counter()
    monkeypatch.setattr(kernels, "_able", _Launches())
    monkeypatch.setattr(transfers, "page_locked", lambda like: torch.empty(like.shape, dtype=like.dtype))
    monkeypatch.setattr(transfers, "event_of", lambda device: _Event())
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Pretending(waits), torch.no_grad():
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def there(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose parameters and buffers pretend."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = Pretended(p.detach())
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = Pretended(b)
    return model


def decode(model, cache, batch, monkeypatch, n_prompt=60, n_new=40) -> dict[str, int]:
    """Waits while tokens are decoded after a prompt, by op and line."""
    ids = prompt(batch, n_prompt + n_new)
    with pretending(monkeypatch) as waits:
        ids = Pretended(ids)
        model(ids[:, :n_prompt], **cache_argument(cache), use_cache=True)
        waits.clear()
        for t in range(n_prompt, n_prompt + n_new):
            model(ids[:, t : t + 1], **cache_argument(cache), use_cache=True)
    return dict(waits)
