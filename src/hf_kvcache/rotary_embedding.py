"""The rotary embedding of an attention module: the model's own, or one that its own class makes of its config."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict

import torch

from hf_kvcache.rope_of_call import frame_of


def has_rotary(module: torch.nn.Module) -> bool:
    """Whether a model with such attention modules has rotary positions at all."""
    if getattr(module.config, "position_embedding_type", "rope") != "rope":
        return False
    return takes_embeddings(module) or rotary_of(module) is not None


class Rotary:
    """The rotary embedding of one layer, made by the model's own class from its own config."""

    def __init__(self, embedding: torch.nn.Module, layer_type: str | None):
        self._embedding = embedding
        is_by_type = hasattr(embedding, f"{layer_type}_inv_freq")
        self._extra, prefix = ((layer_type,), f"{layer_type}_") if is_by_type else ((), "")
        kinds = getattr(embedding, "rope_type", "default")
        self.kind = kinds[layer_type] if is_by_type else kinds
        self.inv_freq = getattr(embedding, f"{prefix}inv_freq", None)
        self.scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0))
        self.is_multimodal = getattr(embedding, "mrope_section", None) is not None

    def __call__(self, positions: torch.Tensor):
        x = torch.zeros(*positions.shape, 1)
        try:
            return self._embedding(x, positions, *self._extra)
        except (IndexError, RuntimeError, ValueError):
            # some take the axes of an image apart and ask for all of them
            return self._embedding(x, positions.expand(3, -1, -1), *self._extra)


def rotary_of(module: torch.nn.Module, root: torch.nn.Module | None = None) -> Rotary | None:
    """The embedding that rotates a layer: the model's own where it is within reach, else one made from its config.

    A model that was brought to bfloat16 after it was loaded has rounded angles, which only its own embedding knows.
    """
    sources = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    source = next((source for source in sources if source is not None and _rotary_classes(source)), None)
    if source is None:
        return None
    name = type(module).__name__.replace("Attention", "RotaryEmbedding")
    # models with several have others for images and sound, whose configs are different
    ranks = {name: 0, name.replace("Rotary", "TextRotary"): 1}
    for kind in sorted(_rotary_classes(source), key=lambda kind: ranks.get(kind.__name__, 2)):
        try:
            with torch.device("cpu"):
                embedding = _embedding_in_use(module, kind, root) or kind(config=_config_of(module))
                rotary = Rotary(twin_of(embedding), layer_type(module))
                rotary(torch.zeros(1, 3, dtype=torch.long))
        except Exception:  # whatever a class may raise that was made for another config
            continue
        return rotary
    return None


def _embedding_in_use(module, kind: type, root: torch.nn.Module | None) -> torch.nn.Module | None:
    """The embedding of this kind that the model has for all layers; None where the model is out of sight."""
    if getattr(module.config, "layer_rope_theta", None):
        return None
    if root is not None:
        return next((m for m in root.modules() if type(m) is kind), None)
    frame = frame_of(module)
    while frame is not None:
        owner = frame.f_locals.get("self")
        children = owner.children() if isinstance(owner, torch.nn.Module) else ()
        found = next((child for child in children if type(child) is kind), None)
        if found is not None:
            return found
        frame = frame.f_back
    return None


def _config_of(module):
    """The module's config, with the angle of this layer where every layer has its own."""
    config, thetas = module.config, getattr(module.config, "layer_rope_theta", None)
    if not thetas or not thetas[module.layer_idx]:
        return config
    config = copy.deepcopy(config)
    config.rope_parameters["rope_theta"] = thetas[module.layer_idx]
    return config


def _rotary_classes(source) -> list[type]:
    found = [value for name, value in vars(source).items() if name.endswith("RotaryEmbedding")]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]


def layer_type(module) -> str | None:
    layer_types = getattr(module.config, "layer_types", None)
    return layer_types[module.layer_idx] if layer_types else None


def takes_embeddings(module) -> bool:
    return "position_embeddings" in inspect.signature(type(module).forward).parameters


class _MadeUp(torch.nn.Module):
    """Stands for a projection: random rows, the same at every call."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        self.width, self.seed = width, seed

    def forward(self, x, *args, **kwargs):
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randn(*x.shape[:-1], self.width, generator=generator, device="cpu")


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def twin_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU in float32 whose projections make rows up, without hooks: nothing of it leads to the model's.

    Projections may lie on other devices, be quantised, or be watched by hooks; norms are small.
    """
    twin = type(module).__new__(type(module))
    state = vars(module) | {name: OrderedDict() for name in _HOOKS if name in vars(module)}
    # accelerate hides the class's own forward pass behind one of the instance
    state.pop("forward", None)
    state |= {"training": False, "_modules": {}}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _plain(t) for name, t in vars(module)[kind].items()}
    for seed, (name, child) in enumerate(vars(module)["_modules"].items()):
        width = getattr(child, "out_features", getattr(child, "nf", None))
        is_projection = isinstance(width, int)
        state["_modules"][name] = child and (_MadeUp(width, seed) if is_projection else twin_of(child))
    vars(twin).update(state)
    return twin


def _plain(t: torch.Tensor | None) -> torch.Tensor | None:
    if t is None or t.is_meta:
        return t
    t = t.detach().cpu()
    return t.float() if t.is_floating_point() else t
