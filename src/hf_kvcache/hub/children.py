"""What a repository's model carries for its cache: modules on its attention modules, filled from its weights."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.adapters.capture import Capture, sources
from hf_kvcache.adapters.modules import CHILD, RETAIN_CHILD, attentions
from hf_kvcache.adapters.scoring import score
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.dmc.retrofitting import retrofit
from hf_kvcache.dmc.settings import Settings

_BLOCK = 4096  # tokens scored at a time


class BasisChild(nn.Module):
    """Bases of one attention module, as low-rank caches ask for them.

    Args:
        shapes: of `{k,v}_{down,up,mean}`, see `Basis`.
        rope: whether keys are projected before RoPE ("pre") or after it ("post").
    """

    def __init__(self, shapes: dict[str, list[int]], rope: str):
        super().__init__()
        self.rope = rope
        self._made: dict[str, Basis] = {}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def basis(self, side: str) -> Basis | None:
        """Of keys ("k") or values ("v"), or None; the same object every time, so that caches share what they place."""
        held, made = getattr(self, f"{side}_down", None), self._made.get(side)
        if held is None:
            return None
        if made is None or not (held.is_meta or held.data_ptr() == made.down.data_ptr()):
            tensors = self()
            self._made[side] = Basis(*(tensors.get(f"{side}_{part}") for part in ("down", "up", "mean")))
        return self._made[side]

    def forward(self) -> dict[str, torch.Tensor]:
        """The tensors: a call, so that weights that are kept elsewhere (`device_map`) are brought for it."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def __getstate__(self):
        # what is derived from the parameters need not be copied or pickled
        return super().__getstate__() | {"_made": {}}


class HeadsChild(nn.Module):
    """Retaining heads of one attention module, as policies ask for them (Locret, Huang et al. 2024).

    Args:
        shapes: of `fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]`.
        attention: the module; hooks on its projections keep their outputs while it runs.
        activation, feature_point: see `RetainingHeads`.
    """

    is_active = True

    def __init__(self, shapes: dict[str, list[int]], attention: nn.Module, activation: str, feature_point: str):
        super().__init__()
        self.activation, self._sources, self._capture = activation, sources(attention, feature_point), Capture()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        attention.register_forward_pre_hook(self._before)
        attention.register_forward_hook(self._after, always_call=True)

    def scores(self) -> torch.Tensor:
        """How much later tokens will look at every token of the current call, float32 `[B, Hkv, S]`."""
        parts, shard = self._capture.parts_of_all_heads(self.fc1.shape[1])
        fc1, fc2 = self()
        fc1, fc2 = fc1.to(parts[0]), shard.own(fc2, 0)
        blocks = zip(*(part.split(_BLOCK, 1) for part in parts))
        return torch.cat([score(torch.cat(block, -1), fc1, fc2, self.activation) for block in blocks], -1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both weights: a call, see `BasisChild`."""
        return self.fc1, self.fc2

    def _before(self, attention: nn.Module, args) -> None:
        self._capture.arm(attention)
        self._capture.watch(attention, self._sources)

    def _after(self, attention: nn.Module, args, output) -> None:
        self._capture.drop()


def basis_children(model: nn.Module, spec: dict) -> None:
    """Hang a `BasisChild` on the attention modules that `spec["shapes"]` names by layer."""
    for i, attention in attentions(model).items():
        if (shapes := spec["shapes"].get(str(i))) is not None:
            setattr(attention.module, CHILD, BasisChild(shapes, spec["rope"]))


def heads_children(model: nn.Module, spec: dict) -> None:
    """The same with `HeadsChild`."""
    for i, attention in attentions(model).items():
        if (shapes := spec["shapes"].get(str(i))) is not None:
            knobs = spec["activation"], spec["feature_point"]
            setattr(attention.module, RETAIN_CHILD, HeadsChild(shapes, attention.module, *knobs))


def retrofit_children(model: nn.Module, spec: dict) -> None:
    """Let the model decide which tokens keep a row."""
    retrofit(model, Settings.from_dict(spec["settings"]))


KINDS = {"basis": basis_children, "heads": heads_children, "retrofit": retrofit_children}


def add_children(model: nn.Module, spec: dict | None) -> None:
    """Give a model what its cache needs; the values are loaded like all its weights.

    Args:
        spec: `kind`, a key of `KINDS`, and what that takes; None for nothing.

    Raises:
        ValueError: it does not describe anything of this kind.
    """
    if spec is None:
        return
    if not isinstance(spec, dict) or spec.get("kind") not in KINDS:
        raise ValueError(f"kv_adapter of the config is none of {', '.join(KINDS)}: {spec!r:.80}")
    KINDS[spec["kind"]](model, spec)
