"""The files of retaining heads: `peft_type` "RETAINING_HEAD", two matrices per layer.

Tensors are called `<attention>.kv_retain.kv_retain_<fc1 | fc2>`; `files` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_kvcache.adapters import files
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import is_count, is_fingerprint
from hf_kvcache.adapters.modules import RETAIN_CHILD
from hf_kvcache.adapters.projections import FEATURE_POINTS
from hf_kvcache.adapters.scoring import activation_of

FORMAT_VERSION = 1
PEFT_TYPE = "RETAINING_HEAD"
PARTS = ("fc1", "fc2")
TARGETS = ("answer_max", "causal", "reconstruction")
DEFAULTS = ("budget", "chunk", "stabilizers", "local")

_MAX_D_R = 1 << 13  # eight times the paper's


def check_config(config: Mapping, where: str) -> None:
    """Raise `AdapterError` unless a config says what an adapter must say, and nothing impossible."""

    def need(name, is_right):
        if not is_right(config.get(name)):
            raise AdapterError(f"{where}: {name}={config.get(name)!r} is damaged or missing")

    for name in ("feature_dim", "num_kv_heads"):
        need(name, is_count)
    # transformers makes the tensors before it reads the file
    need("d_r", lambda d_r: is_count(d_r) and d_r <= _MAX_D_R)
    need("layers", _are_layers)
    need("activation", lambda name: isinstance(name, str))
    activation_of(config["activation"])
    need("feature_point", lambda point: point in FEATURE_POINTS)
    need("target", lambda target: target in TARGETS)
    need("query_aware", lambda value: isinstance(value, bool))
    need("n_query", lambda n: n is None or is_count(n))
    for name in DEFAULTS:
        need(f"default_{name}", lambda n: n is None or _is_index(n))
    need("fingerprint", is_fingerprint)
    need("base_model_name_or_path", lambda value: isinstance(value, str | None))


def _are_layers(layers) -> bool:
    if not isinstance(layers, list) or not layers:
        return False
    return all(_is_index(i) for i in layers) and layers == sorted(set(layers))


def _is_index(value) -> bool:
    return is_count(value) or (isinstance(value, int) and not isinstance(value, bool) and value == 0)


def shapes(config: Mapping) -> dict[files.Place, tuple[int, ...]]:
    """Shapes of the tensors that a config speaks of, by layer and part."""
    own = {"fc1": (config["d_r"], config["feature_dim"]), "fc2": (config["num_kv_heads"], config["d_r"])}
    return {(i, part): own[part] for i in config["layers"] for part in PARTS}


FORMAT = files.Format(
    peft_type=PEFT_TYPE,
    title="an adapter of retaining heads",
    child=RETAIN_CHILD,
    parts=PARTS,
    check=check_config,
    shapes=shapes,
    spoken=lambda layer_idx, part: f"{part} of layer {layer_idx}",
    version=FORMAT_VERSION,
)


def settings_of(config: Mapping) -> dict:
    """`RetainingHeads.settings` from a config."""
    names = ("activation", "feature_point", "target", "query_aware", "n_query")
    defaults = {name: config[f"default_{name}"] for name in DEFAULTS if config[f"default_{name}"] is not None}
    return {name: config[name] for name in names} | {"defaults": defaults}
