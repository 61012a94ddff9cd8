"""A filled cache on disk: one safetensors file and a manifest that says what it is.

    manifest.json            format version, model fingerprint, method, shapes, checksum
    cache-<checksum>.safetensors

The manifest is written last and replaced atomically, so a reader finds the old cache or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_kvcache.adapters.base_weights import weights_digest
from hf_kvcache.codecs.base import codec_from_spec
from hf_kvcache.layer import KVLayer
from hf_kvcache.policies.base import policy_from_spec
from hf_kvcache.shards import WHOLE, shard_of_heads
from hf_kvcache.slots import layer_class
from hf_kvcache.stores.shared import SharedStore

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_TENSORS_NAME = re.compile(r"cache-[0-9a-f]{16}\.safetensors")


class CacheFileError(ValueError):
    """Raised when saved files are truncated, altered, of another format, or of another model."""


def save(cache, directory: str | os.PathLike) -> Path:
    """Write the rows in use of every layer to `directory` (created; an earlier cache there is replaced)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, layers = {}, []
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            layer.finish()
    for i, layer in enumerate(cache.layers):
        describe = _describe if isinstance(layer, KVLayer) else _describe_stock
        entry, own = describe(layer)
        layers.append(entry)
        tensors |= {f"{i}.{name}": t.detach().to("cpu").contiguous() for name, t in own.items()}

    with tempfile.NamedTemporaryFile(dir=directory, prefix=".saving-", delete=False) as unfinished:
        partial = Path(unfinished.name)
    try:
        save_file(tensors, partial)
        checksum = _checksum(partial)
        name = f"cache-{checksum[:16]}.safetensors"
        manifest = {
            "format_version": FORMAT_VERSION,
            "class": type(cache).__name__,
            "model": cache.fingerprint,
            "policy": None if cache.policy is None else cache.policy.spec(),
            "window": cache.window,
            "n_sink": cache.n_sink,
            "min_length": cache.min_length,
            "exact_prefill": cache.exact_prefill,
            "compact": cache.compact,
            "max_length": cache.max_length,
            "nbytes_dense": cache.nbytes_dense,
            "tensors": name,
            "sha256": checksum,
            "shapes": {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in tensors.items()},
            "layers": layers,
            "groups": _groups(cache),
        }
        os.replace(partial, directory / name)
        partial.write_text(json.dumps(manifest, indent=1))
        os.replace(partial, directory / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    for stale in directory.glob("cache-*.safetensors"):
        if stale.name != name:
            stale.unlink()
    return directory


def load(cls, directory: str | os.PathLike, model=None, device: torch.device | str | None = None):
    """Read a cache back; see `KVCache.load`."""
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if device is None:
        device = model.device if model is not None else "cpu"
    tensors = {name: t.to(device) for name, t in _read_tensors(directory, manifest).items()}
    groups = manifest.get("groups", [])
    for leader, *others in groups:
        shared = {name: tensors.get(f"{leader}.{name}") for name in ("constants.keys.down", "constants.values.down")}
        tensors |= {f"{i}.{name}": t for i in others for name, t in shared.items() if t is not None}
    cache = cls(
        policy=policy_from_spec(manifest["policy"]),
        window=manifest["window"],
        n_sink=manifest["n_sink"],
        compact=manifest.get("compact", False),
        max_length=manifest["max_length"],
        config=None if model is None else model.config,
    )
    # codecs belong to the restored layers, not to this cache, which would refuse a min_length of its own
    cache.min_length, cache.exact_prefill = manifest.get("min_length", 0), manifest.get("exact_prefill", True)
    stock, cache.layers = cache.layers, []
    for i, entry in enumerate(manifest["layers"]):
        own = {key.split(".", 1)[1]: t for key, t in tensors.items() if key.split(".", 1)[0] == str(i)}
        if entry["class"] == "KVLayer":
            cache.layers.append(_restore(i, entry, own, cache))
        elif i < len(stock) and type(stock[i]).__name__ == entry["class"]:
            cache.layers.append(_restore_stock(stock[i], entry, own))
        else:
            raise CacheFileError(f"{directory}: layer {i} is a {entry['class']}; load it with model=")
    for group in groups:
        for i in group:
            cache.layers[i].store.join(cache.layers[group[0]].store, len(group))
    cache.expect(manifest["model"])
    if model is not None:
        cache.check_model(_attention(model, cache.first_layer), str(directory))
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, KVLayer) and layer.needs_model and layer.is_initialized:
                cache.attach(_attention(model, i), layer, model)
    return cache


def fingerprint(module: torch.nn.Module) -> dict:
    """What tells one model from another, read off one attention layer: shapes, and a sample of the weights.

    Weights are sampled in bfloat16, so that the same model loaded in another dtype has the same fingerprint.
    """
    config = module.config
    return {
        "attention": type(module).__name__,
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "weights": weights_digest(module),
    }


def whose(layer: KVLayer, module: torch.nn.Module) -> dict:
    """Which of the model's heads a layer has rows of, where several processes share them; empty elsewhere."""
    shard = shard_of_heads(module, layer.n_kv_heads) if layer.is_initialized else WHOLE
    return {} if shard.count == 1 else {"shard": f"{shard.rank} of {shard.count}"}


def _groups(cache) -> list[list[int]]:
    """Layers that share their packed rows, the one that holds them first."""
    stores = [layer.store if isinstance(layer, KVLayer) else None for layer in cache.layers]
    leaders = [store for store in stores if isinstance(store, SharedStore) and store.group[:1] == [store]]
    return [[stores.index(store) for store in leader.group] for leader in leaders]


def _attention(model, layer_idx: int) -> torch.nn.Module:
    return next(m for m in model.modules() if getattr(m, "layer_idx", None) == layer_idx and hasattr(m, "scaling"))


def _describe(layer: KVLayer) -> tuple[dict, dict]:
    entry = {
        "class": "KVLayer",
        "tokens_seen": layer.tokens_seen,
        "has_padding": layer.has_padding,
        "evicted_at": layer.evicted_at,
        "judged_at": layer.judged_at,
        "keys": None if layer.store.keys is None else layer.store.keys.spec(),
        "values": None if layer.store.values is None else layer.store.values.spec(),
        "n_tokens": {name: buffer.n_tokens for name, buffer in layer.store.buffers().items()},
    }
    if layer.is_initialized:
        shape = {"batch_size": layer.batch_size, "n_kv_heads": layer.n_kv_heads, "head_dim": layer.head_dim}
        entry |= shape | {"dtype": str(layer.dtype).removeprefix("torch.")}
    views = {
        f"{buffer_name}.{name}": t
        for buffer_name, buffer in layer.store.buffers().items()
        for name, t in buffer.views().items()
    }
    for side in ("keys", "values"):
        views |= {f"constants.{side}.{name}": t for name, t in layer.store.constants(side).items()}
    return entry, views


def _restore(i: int, entry: dict, tensors: dict, cache) -> KVLayer:
    layer = layer_class(cache.policy)(
        i,
        *(_restore_codec(side, entry, tensors) for side in ("keys", "values")),
        cache.policy,
        window=cache.window,
        n_sink=cache.n_sink,
        min_length=cache.min_length,
        max_length=cache.max_length,
        exact_prefill=cache.exact_prefill,
        compact=cache.compact,
    )
    for buffer_name, buffer in layer.store.buffers().items():
        own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == buffer_name}
        # files of earlier releases know fewer buffers
        buffer.restore(own, entry["n_tokens"].get(buffer_name, 0))
    if "dtype" in entry:
        layer.batch_size, layer.n_kv_heads, layer.head_dim = (
            entry[name] for name in ("batch_size", "n_kv_heads", "head_dim")
        )
        layer.dtype = layer.store.dtype = getattr(torch, entry["dtype"])
        layer.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        layer.is_initialized = True
    for name in ("tokens_seen", "has_padding", "evicted_at", "judged_at"):
        setattr(layer, name, entry.get(name, 0))
    layer.restored()
    return layer


def _restore_codec(side: str, entry: dict, tensors: dict):
    codec, prefix = codec_from_spec(entry[side]), f"constants.{side}."
    constants = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return codec if codec is None else codec.with_constants(constants)


def _describe_stock(layer) -> tuple[dict, dict]:
    if not hasattr(layer, "keys"):
        raise ValueError(f"a {type(layer).__name__} cannot be saved: only attention layers can")
    state = vars(layer)
    scalars = {name: value for name, value in state.items() if isinstance(value, (bool, int))}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {"class": type(layer).__name__, "state": scalars}, tensors


def _restore_stock(layer, entry: dict, tensors: dict):
    for name, value in (entry["state"] | tensors).items():
        setattr(layer, name, value)
    if tensors:
        layer.dtype, layer.device = tensors["keys"].dtype, tensors["keys"].device
    return layer


def _read_manifest(directory: Path) -> dict:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        version = manifest["format_version"]
    except FileNotFoundError:
        raise CacheFileError(f"{directory} holds no saved cache: {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheFileError(f"{directory / MANIFEST} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CacheFileError(f"{directory / MANIFEST} has format {version!r}, this release reads {FORMAT_VERSION}")
    return manifest


def _read_tensors(directory: Path, manifest: dict) -> dict[str, torch.Tensor]:
    name = manifest.get("tensors", "")
    if not _TENSORS_NAME.fullmatch(name):
        raise CacheFileError(f"{directory / MANIFEST} names a tensor file {name!r} that no cache would write")
    path = directory / name
    if not path.is_file():
        raise CacheFileError(f"{path} is missing")
    if _checksum(path) != manifest["sha256"]:
        raise CacheFileError(f"{path} is truncated or altered: its checksum is not the one in {MANIFEST}")
    tensors = load_file(path)
    found = {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in tensors.items()}
    if found != manifest["shapes"]:
        raise CacheFileError(f"{path} does not hold the tensors that {MANIFEST} lists")
    return tensors


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
