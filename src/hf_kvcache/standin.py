"""Objects that stand where transformers expects a tensor, and make it once somebody computes with them."""

from __future__ import annotations

import torch


class TensorStandIn:
    """Behaves as the tensor that `_tensor` makes, wherever it is not recognised for what it is."""

    __slots__ = ()
    __hash__ = object.__hash__  # comparing is for tensors, identity stays

    def _tensor(self) -> torch.Tensor:
        raise NotImplementedError

    def __getitem__(self, index):
        return self._tensor()[index]

    def __getattr__(self, name: str):
        # protocols of Python (copying, pickling, array interfaces) are not asked of the tensor
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a {type(self).__name__} has no {name!r}, and neither have tensors")
        return getattr(self._tensor(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*_with_tensors(args), **_with_tensors(kwargs or {}))


def _with_tensors(value):
    if isinstance(value, TensorStandIn):
        return value._tensor()
    if isinstance(value, dict):
        return {name: _with_tensors(item) for name, item in value.items()}
    return type(value)(map(_with_tensors, value)) if type(value) in (list, tuple) else value


def _operator(name: str):
    def apply(self, *others):
        return getattr(self._tensor(), name)(*_with_tensors(others))

    return apply


# Python looks operators up in the class
for _name in "add radd sub rsub mul rmul truediv matmul rmatmul neg and rand or ror invert eq ne lt le gt ge".split():
    setattr(TensorStandIn, f"__{_name}__", _operator(f"__{_name}__"))
