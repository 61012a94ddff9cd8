"""How a model rotates its keys, found by running its own attention code on made-up tokens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch

from hf_kvcache.compat import CACHE_NAMES
from hf_kvcache.rope import Rope, rotate
from hf_kvcache.rope_of_call import OTHERWISE, UNSEEN, embeddings_given, goes_by
from hf_kvcache.rotary_embedding import Rotary, layer_type, rotary_of, takes_embeddings, twin_of

PROBED = ((0, 0, 0), (0, 1, 77))  # positions at which the made-up tokens stand, at first and then


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
    rotary, twin = rotary_of(module, root), twin_of(module)
    first, then = (_rows(twin, rotary, torch.tensor([positions])) for positions in PROBED)
    if first is None or then is None:
        if not _rotates_by_name(module):
            return None
        first, then = _rows_by_function(module, rotary, head_dim)
    elif _is_same(first, then) and (rotary is not None or not takes_embeddings(module)):
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
    if given is not UNSEEN and not goes_by(given, rope):
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


def _unrotated(rotary: Rotary):
    """Embeddings that leave keys as they are."""

    def embeddings(positions):
        cos, sin = rotary(positions)
        return torch.ones_like(cos), torch.zeros_like(sin)

    return embeddings


# -- the model's own code ----------------------------------------------------------------------------------------------


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


# -- what modules and configs say --------------------------------------------------------------------------------------


def _is_given_embeddings(module) -> bool:
    """Whether the model gives its positions to a layer that would also work without.

    Raises:
        ValueError: nothing says so.
    """
    config, kind = module.config, layer_type(module)
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


def _rows_by_function(module, rotary: Rotary | None, head_dim: int):
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
