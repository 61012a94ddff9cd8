"""How a model rotates its keys, found by running its own attention code on made-up tokens."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable

import torch

from hf_kvcache.compat import CACHE_NAMES
from hf_kvcache.rope import Rope, rotate

UNSEEN = object()
PROBED = ((0, 0, 0), (0, 1, 77))  # positions at which the made-up tokens stand, at first and then
OTHERWISE = 'LowRank(rope="post") does without'


def rope_of(module: torch.nn.Module, head_dim: int, root: torch.nn.Module | None = None) -> Rope | None:
    """The rotation that an attention module gives its keys; None where keys do not depend on positions.

    The forward pass of the module's class runs on three made-up tokens, at two sets of positions, until keys go to a
    cache; what changes in between is compared with `rope.rotate`. This tells layers without positions, rotations of
    some of the channels, and layouts that are not known. Weights and hooks of the module are not involved. Where the
    class cannot be run like that, `use_rope` and the layer types of the config decide.

    Args:
        module: the attention module. While its forward pass is running, what it was given for its positions is looked
            at: some models give some of their layers none.
        head_dim: channels of a key.
        root: the model, to be asked for its own embedding where it is not running.

    Raises:
        ValueError: a layout, a scaling or an angle that is not understood, or one that changes as the text grows.
    """
    name, given = type(module).__name__, embeddings_given(module)
    if given is None:
        return None
    rotary, twin = _rotary_of(module, root), _twin(module)
    first, then = (_rows(twin, rotary, torch.tensor([positions])) for positions in PROBED)
    if first is None or then is None:
        if not _rotates_by_name(module):
            return None
        first, then = _rows_by_function(module, rotary, head_dim)
    elif _is_same(first, then) and (rotary is not None or not _takes_embeddings(module)):
        return None
    elif given is UNSEEN and _rows(twin, None, torch.tensor([PROBED[0]])) is not None:
        # a layer that works without embeddings may be one that gets none
        if not _is_given_embeddings(module):
            return None
    if rotary is None or rotary.inv_freq is None:
        raise ValueError(f"{name}: no rotary embedding with frequencies was found beside it; {OTHERWISE}")
    if rotary.kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{name}: {rotary.kind} RoPE changes its angles as the text grows, so keys cannot be taken back before it; "
            f"{OTHERWISE}"
        )
    rope = Rope(rotary.inv_freq, rotary.scaling, is_multimodal=rotary.is_multimodal)
    plain = _rows(twin, _unrotated(rotary), torch.tensor([PROBED[0]]))
    if not _is_rotated(first, then, rope) or not _is_scaled(plain, first, rope):
        raise ValueError(
            f"{name}: its RoPE does not pair channel i with i + R / 2, or is not all that happens to keys; {OTHERWISE}"
        )
    if given is not UNSEEN and not _goes_by(given, rope):
        raise ValueError(
            f"{name}: layer {module.layer_idx} is rotated by other angles than its config says; {OTHERWISE}"
        )
    return rope


def _is_same(first, then) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(first, then, strict=True))


def _is_rotated(first, then, rope: Rope) -> bool:
    """Whether `rope` makes of keys at the first positions those at the others, and leaves values alone."""
    (k, v), (turned, same) = first, then
    angles = torch.tensor([PROBED[1]])[..., None] * rope.inv_freq
    if 2 * angles.shape[-1] > k.shape[-1] or not torch.allclose(v, same, rtol=0, atol=1e-6):
        return False
    known = rotate(k, angles.cos().float(), angles.sin().float())
    return known.shape == turned.shape and bool((turned - known).abs().max() <= 1e-3)


def _is_scaled(plain, first, rope: Rope) -> bool:
    """Whether keys at position 0 are those without rotation, times the scaling; True where that was not seen."""
    if plain is None or plain[0].shape != first[0].shape:
        return True
    known = plain[0].clone()
    known[..., : 2 * rope.inv_freq.shape[0]] *= rope.scaling
    return bool((first[0] - known).abs().max() <= 1e-3)


def _unrotated(rotary: _Rotary):
    """Embeddings that leave keys as they are."""

    def embeddings(positions):
        cos, sin = rotary(positions)
        return torch.ones_like(cos), torch.zeros_like(sin)

    return embeddings


def has_rotary(module: torch.nn.Module) -> bool:
    """Whether a model with such attention modules has rotary positions at all."""
    if getattr(module.config, "position_embedding_type", "rope") != "rope":
        return False
    return _takes_embeddings(module) or _rotary_of(module) is not None


def embeddings_given(module: torch.nn.Module):
    """The `position_embeddings` that the running forward pass of `module` was given; `UNSEEN` if none is running."""
    frame = _frame_of(module)
    return UNSEEN if frame is None else frame.f_locals["position_embeddings"]


def _frame_of(module: torch.nn.Module):
    """The frame of the running forward pass of `module`, which takes `position_embeddings`; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        is_given = "position_embeddings" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if is_given and frame.f_locals.get("self") is module:
            return frame
        frame = frame.f_back
    return None


def refuse_images(module: torch.nn.Module, ropes, is_real: torch.Tensor | None) -> None:
    """Raise if the running call has tokens whose positions do not count tokens, as those of images.

    Args:
        module: the attention module, whose forward pass is running.
        ropes: those of its layer.
        is_real: which of the tokens are not padding, `[B, S]`; None means all.

    Raises:
        ValueError: there are some, or it cannot be seen.
    """
    for rope in ropes:
        steps = _steps(embeddings_given(module), rope)
        if steps is None:
            raise ValueError(
                f"layer {module.layer_idx}: positions may be those of images, and what the model made of them cannot "
                f"be seen (is it compiled?); {OTHERWISE}, and so do caches without rerotate_keys=True"
            )
        if is_real is not None:
            steps |= ~(is_real[:, 1:] & is_real[:, :-1]).to(steps.device)
        if not steps.all():
            raise ValueError(
                f"layer {module.layer_idx}: the positions of an image or a video do not count tokens, so keys and "
                f"queries cannot be rotated by them; {OTHERWISE}, and so do other policies without rerotate_keys=True"
            )


def _steps(given, rope: Rope) -> torch.Tensor | None:
    """Whether a token stands one position behind the one before it, on all axes, boolean `[B, S - 1]`.

    None where what was given is not understood.
    """
    half = rope.inv_freq.shape[0]
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2
    if not is_pair or not all(isinstance(x, torch.Tensor) and x.shape[-1] in (half, 2 * half) for x in given):
        return None
    # tables are rounded to the dtype of the model
    tolerance = 1e-2 if given[0].dtype == torch.float32 else 4e-2
    cos, sin = (x[..., :half].float() / rope.scaling for x in given)
    back, front = slice(None, -1), slice(1, None)
    cosine = cos[..., front, :] * cos[..., back, :] + sin[..., front, :] * sin[..., back, :]
    sine = sin[..., front, :] * cos[..., back, :] - cos[..., front, :] * sin[..., back, :]
    angle = rope.inv_freq.to(cos.device, torch.float32)
    is_step = ((cosine - angle.cos()).abs() < tolerance) & ((sine - angle.sin()).abs() < tolerance)
    is_step = is_step.all(-1)
    return is_step if is_step.dim() == 2 else is_step.flatten(0, -3).all(0)


def _goes_by(given, rope: Rope) -> bool:
    """Whether the call's own embeddings advance by the angles of `rope`, as far as there is anything to see."""
    steps = _steps(given, rope)
    # images and padding stand elsewhere: one step between neighbours is enough
    return steps is None or not steps.numel() or bool(steps.any()) or _stands_still(given)


def _stands_still(given) -> bool:
    """Whether all tokens of the call have one position: embeddings `[..., S, R]` that are the same for all of them."""
    return all(bool((x[..., 1:, :] == x[..., :-1, :]).all()) for x in given)


# -- the model's own code ----------------------------------------------------------------------------------------------


class _Rotary:
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


def _rotary_of(module: torch.nn.Module, root: torch.nn.Module | None = None) -> _Rotary | None:
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
                rotary = _Rotary(_twin(embedding), _layer_type(module))
                rotary(torch.tensor([PROBED[0]]))
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
    frame = _frame_of(module)
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


def _layer_type(module) -> str | None:
    layer_types = getattr(module.config, "layer_types", None)
    return layer_types[module.layer_idx] if layer_types else None


class _Captured(Exception):
    """Keys have arrived at the cache: there is nothing left to run."""


class _Capture:
    """A cache that takes the rows of one call and ends it."""

    rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        self.rows = key_states.float(), value_states.float()
        raise _Captured

    def get_seq_length(self, *args) -> int:
        return 0


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


def _twin(module: torch.nn.Module) -> torch.nn.Module:
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
        state["_modules"][name] = child and (_MadeUp(width, seed) if is_projection else _twin(child))
    vars(twin).update(state)
    return twin


def _plain(t: torch.Tensor | None) -> torch.Tensor | None:
    if t is None or t.is_meta:
        return t
    t = t.detach().cpu()
    return t.float() if t.is_floating_point() else t


@torch.no_grad()
def _rows(twin: torch.nn.Module, rotary: Callable | None, positions: torch.Tensor):
    """Keys and values `[1, Hkv, n, D]` of made-up tokens at `positions` `[1, n]`; None if the class fails on them."""
    parameters, capture = inspect.signature(type(twin).forward).parameters, _Capture()
    arguments = {
        "position_ids": positions,
        "attention_mask": None,
        **dict.fromkeys((*CACHE_NAMES, "layer_past"), capture),
    }
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    arguments = dict.fromkeys(needed[2:]) | arguments
    width = getattr(twin.config, "hidden_size", 1)
    try:
        if "position_embeddings" in parameters:
            arguments["position_embeddings"] = None if rotary is None else rotary(positions)
        type(twin).forward(twin, torch.zeros(*positions.shape, width, device="cpu"), **arguments)
    except _Captured:
        return capture.rows
    except Exception:  # whatever a forward pass may raise that was not made for this
        return None
    return None


def _takes_embeddings(module) -> bool:
    return "position_embeddings" in inspect.signature(type(module).forward).parameters


# -- what modules and configs say --------------------------------------------------------------------------------------


def _is_given_embeddings(module) -> bool:
    """Whether the model gives its positions to a layer that would also work without.

    Raises:
        ValueError: nothing says so.
    """
    config, kind = module.config, _layer_type(module)
    thetas = getattr(config, "layer_rope_theta", None)
    if thetas:
        return bool(thetas[module.layer_idx])
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None and hasattr(config, "rope_parameters"):
        return False
    if kind in (parameters or {}):
        return parameters[kind] is not None
    if hasattr(config, "position_embedding_type"):
        return config.position_embedding_type == "rope"
    attending = {
        t for t in getattr(config, "layer_types", None) or () if t.endswith("_attention") and "linear" not in t
    }
    if len(attending) > 1:
        raise ValueError(
            f"{type(module).__name__}: whether layer {module.layer_idx} has rotary positions shows while the model "
            "runs; let it go on with this cache once"
        )
    return True


def _rotates_by_name(module) -> bool:
    """Whether a module that cannot be run on made-up tokens rotates its keys.

    Raises:
        ValueError: nothing says so.
    """
    if hasattr(module, "use_rope"):
        return bool(module.use_rope)
    if len(set(getattr(module.config, "layer_types", None) or ())) > 1:
        raise ValueError(
            f"{type(module).__name__}: its layers are of several kinds, and it cannot be found out which of them have "
            f"rotary positions; {OTHERWISE}"
        )
    return True


def _rows_by_function(module, rotary: _Rotary | None, head_dim: int):
    """Made-up keys as the function beside the attention class rotates them, and values, at both sets of positions."""
    sources = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    function = next((f for s in sources if (f := getattr(s, "apply_rotary_pos_emb", None)) is not None), None)
    if function is None or rotary is None or rotary.inv_freq is None:
        raise ValueError(f"{type(module).__name__}: no rotary embedding that is known was found beside it; {OTHERWISE}")
    x = torch.randn(1, 1, 3, head_dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    # models that rotate some of the channels slice them off in the attention itself
    x = x[..., : 2 * rotary.inv_freq.shape[0]]
    try:
        return tuple((function(x, x, *rotary(torch.tensor([positions])))[1], x) for positions in PROBED)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{type(module).__name__}: its RoPE cannot be asked ({error}); {OTHERWISE}") from error
