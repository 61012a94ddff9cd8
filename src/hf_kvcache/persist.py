"""A filled cache on disk: one safetensors file and a manifest that says what it is.

    manifest.json            format version, model fingerprint, method, shapes, checksum
    cache-<checksum>.safetensors

The manifest is written last and replaced atomically, so a reader finds the old cache or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_kvcache import hf_layer_entries, restoring
from hf_kvcache.described import describe_layers, describe_pair, described_layers, described_pair, described_policy
from hf_kvcache.former_files import tensors_of_today
from hf_kvcache.identity import CacheFileError
from hf_kvcache.layer import KVLayer
from hf_kvcache.manifest import FORMAT_VERSION, LayerEntry, Manifest, dense_bytes, read_manifest
from hf_kvcache.typed import Misfit, class_named, shown

MANIFEST = "manifest.json"
MOST_BYTES = 2**26  # of a manifest
OPTIONS = ("window", "n_sink", "min_length", "exact_prefill", "rerotate_keys", "max_length", "edge_layers")
OPTIONS += ("offloading",)


def save(cache, directory: str | os.PathLike) -> Path:
    """Write the rows in use of every layer to `directory` (created; an earlier cache there is replaced)."""
    directory = Path(directory)
    described, views = describe(cache)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in views.items()}

    with tempfile.NamedTemporaryFile(dir=directory, prefix=".saving-", delete=False) as unfinished:
        partial = Path(unfinished.name)
    try:
        save_file(tensors, partial)
        checksum = _checksum(partial)
        name = f"cache-{checksum[:16]}.safetensors"
        manifest = described | {"tensors": name, "sha256": checksum, "shapes": _shapes(tensors)}
        os.replace(partial, directory / name)
        partial.write_text(json.dumps(manifest, indent=1))
        os.replace(partial, directory / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    for stale in directory.glob("cache-*.safetensors"):
        if stale.name != name:
            stale.unlink()
    return directory


def describe(cache) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a manifest says of a cache, and views of its tensors in use. The cache stays as it is.

    Raises:
        ValueError: some of it cannot be written down.
    """
    tensors, layers = {}, []
    for i, layer in enumerate(cache.layers):
        entry, own = (restoring.describe if isinstance(layer, KVLayer) else hf_layer_entries.describe_hf_layer)(layer)
        layers.append(entry)
        tensors |= {f"{i}.{name}": t for name, t in own.items()}
    described = {
        "format_version": FORMAT_VERSION,
        "class": type(cache).__name__,
        "model": model_of(cache),
        "policy": None if cache.policy is None else cache.policy.spec(),
        "codec": describe_pair(cache.codec),
        "edge_codec": describe_pair(cache.edge_codec),
        **{name: getattr(cache, name) for name in OPTIONS},
        "records_past": cache._records_past,
        "attributes": own_attributes(cache),
        "nbytes_dense": dense_bytes(layers),
        "layers": layers,
        "groups": groups_of(cache),
    }
    if cache.per_layer:
        # files without it are read by earlier releases, too
        described["per_layer"] = describe_layers(cache.per_layer)
    for name, value in described["attributes"].items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(f"{type(cache).__name__}.{name} is a {type(value).__name__}, which a file cannot hold")
    for name in ("policy", "codec", "edge_codec"):
        try:
            json.dumps(described[name])
        except TypeError as error:
            raise ValueError(f"{getattr(cache, name)!r} cannot be saved: its spec() is no JSON ({error})") from None
    return described, tensors


def model_of(cache) -> dict | None:
    """The fingerprint of the model whose tokens a cache holds, None where no model has filled it.

    Raises:
        ValueError: that model is gone, so that nobody could say any more whose tokens these are.
    """
    if cache._model is not None and cache._model() is None:
        raise ValueError(
            "the model that filled this cache is gone, and with it what identifies it: save the cache while the model "
            "is there, or say rebind() first to let any model go on with it"
        )
    return cache.fingerprint


def load(cls, directory: str | os.PathLike, model=None, device: torch.device | str | None = None):
    """Read a cache back; see `KVCache.load`."""
    cls = _plain(cls)
    directory = Path(directory)
    raw = _read_json(directory / MANIFEST)
    try:
        manifest = read_manifest(raw)
    except Misfit as error:
        raise CacheFileError(f"{directory / MANIFEST} is damaged: {error}") from error
    if device is None:
        device = model.device if model is not None else "cpu"
    tensors = {name: t.to(device) for name, t in _read_tensors(directory, manifest).items()}
    try:
        cache = assemble(cls, manifest, tensors, None if model is None else model.config)
    except Misfit as error:
        raise CacheFileError(f"{directory / MANIFEST} does not fit {manifest.tensors}: {error}") from error
    if model is not None:
        if any(isinstance(layer, KVLayer) for layer in cache.layers):
            cache.check_model(_attention(model, cache.first_layer, str(directory)), str(directory))
            # the first call may come from another model all the same
            cache.expect(manifest.model)
        attach(cache, model, str(directory))
    return cache


def assemble(cls: type, manifest: Manifest, tensors: dict[str, torch.Tensor], config=None):
    """The cache that a manifest and its tensors describe, which will look for its model.

    Raises:
        Misfit: they do not go together.
    """
    kind = class_named(manifest.kind, cls, "class", "cache")
    codec, edge_codec = described_pair(manifest.codec, "codec"), described_pair(manifest.edge_codec, "edge_codec")
    policy, per_layer = described_policy(manifest.policy, "policy"), described_layers(manifest.per_layer, "per_layer")
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    options = {name: getattr(manifest, name) for name in OPTIONS}
    # without a GPU there is nothing to bring layers to
    options["offloading"] &= device.type == "cuda"
    # files of format 1 know the codecs of layers only, and a cache without a codec refuses what goes with one
    later = {} if manifest.format_version > 1 else {n: options.pop(n) for n in ("min_length", "exact_prefill")}
    cache = kind.__new__(kind)
    try:
        parts = dict(policy=policy, codec=codec, edge_codec=edge_codec, per_layer=per_layer)
        construct(cache, **parts, config=config, **options)
    except Exception as error:
        # options that never were may break a constructor anywhere
        raise Misfit(f"policy, codec, per_layer, {', '.join(OPTIONS)}: {str(error)[:300]}") from error
    for name, value in later.items():
        setattr(cache, name, value)
    for name, value in manifest.attributes.items():
        if hasattr(cache, name):
            raise Misfit(f"attributes.{shown(name)[1:-1]}: a {kind.__name__} has that already")
        setattr(cache, name, value)
    cache._records_past = manifest.records_past
    hf_layers, cache.layers = cache.layers, []
    shared = [f"constants.{side}.down" for side in ("keys", "values")]
    for leader, *others in manifest.groups:
        there = [name for name in shared if f"{leader}.{name}" in tensors]
        tensors = tensors | {f"{i}.{name}": tensors[f"{leader}.{name}"] for i in others for name in there}
    by_layer: dict[str, dict[str, torch.Tensor]] = {str(i): {} for i in range(len(manifest.layers))}
    for key, t in tensors.items():
        i, _, name = key.partition(".")
        if i not in by_layer:
            raise Misfit(f"layers: there are {len(by_layer)}, and the file holds {key}")
        by_layer[i][name] = t
    for i, entry in enumerate(manifest.layers):
        own = by_layer[str(i)]
        if isinstance(entry, LayerEntry):
            if i < len(hf_layers) and not isinstance(hf_layers[i], KVLayer):
                kind = type(hf_layers[i]).__name__
                raise Misfit(f"layers[{i}].class: the model has a {kind} there, which holds its own")
            cache.layers.append(restoring.restore(i, entry, own, cache, i in manifest.followers))
        elif i < len(hf_layers) and type(hf_layers[i]).__name__ == entry.kind:
            cache.layers.append(hf_layer_entries.restore_hf_layer(i, hf_layers[i], entry, own))
        else:
            raise Misfit(
                f"layers[{i}].class: layer {i} is a {shown(entry.kind)}; load it with model= that has one there"
            )
    restoring.join_groups(cache.layers, manifest.groups)
    if cache._hf_layers is not None:
        for i, layer in enumerate(cache.layers):
            if i < len(cache._hf_layers) and cache._hf_layers[i] is not None:
                cache._hf_layers[i] = layer
    cache.expect(manifest.model)
    return cache


def construct(cache, **options) -> None:
    """Initialise an instance of any class of caches by the arguments of `KVCache`."""
    _plain(type(cache)).__init__(cache, **options)


def attach(cache, model, what: str) -> None:
    """Let the layers of a cache that has found its model take from it what they need.

    Raises:
        CacheFileError: the model has no layer where the cache has one.
    """
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVLayer) and layer.needs_model and layer.is_initialized:
            cache.attach(_attention(model, i, what), layer, model)


def groups_of(cache) -> list[list[int]]:
    """Layers that share their packed rows, the one that holds them first."""
    stores = [layer.store if isinstance(layer, KVLayer) else None for layer in cache.layers]
    leaders = [s for s in stores if s is not None and s.shares_layers and s.group[:1] == [s]]
    return [[stores.index(store) for store in leader.group] for leader in leaders]


def own_attributes(cache) -> dict:
    """What a cache has beside that of every `KVCache`, set by its own class or by its owner."""
    known = vars(_plain(type(cache))()).keys() | {"only_non_sliding", "prefetch_stream"}
    return {name: value for name, value in vars(cache).items() if name not in known}


def _plain(kind: type) -> type:
    """`KVCache` itself, of this copy of the code."""
    return next(base for base in kind.__mro__ if base.__qualname__ == "KVCache")


def _attention(model, layer_idx: int, what: str) -> torch.nn.Module:
    named = list(model.named_modules(remove_duplicate=False))
    for _, module in named:
        if getattr(module, "layer_idx", None) == layer_idx and hasattr(module, "scaling"):
            return module
    # a module that serves several layers, as in Zamba 2, has no index of its own: the name of its layer says which
    for name, module in named:
        if str(layer_idx) in name.split(".") and hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            return module
    raise CacheFileError(f"{what} has a layer {layer_idx}, and {type(model).__name__} has no attention there")


def _read_json(path: Path) -> object:
    if not path.is_file():
        raise CacheFileError(f"{path.parent} holds no saved cache: {path.name} is missing")
    if path.stat().st_size > MOST_BYTES:
        raise CacheFileError(f"{path} is damaged: no manifest is larger than {MOST_BYTES} bytes")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"{path} is damaged: {error}") from error


def _read_tensors(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    path = directory / manifest.tensors
    if not path.is_file():
        raise CacheFileError(f"{path} is missing")
    if _checksum(path) != manifest.sha256:
        raise CacheFileError(f"{path} is truncated or altered: its checksum is not the one in {MANIFEST}")
    try:
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CacheFileError(f"{path} is no safetensors file: {error}") from error
    check_shapes(manifest, tensors, path)
    return tensors if manifest.format_version == FORMAT_VERSION else tensors_of_today(tensors)


def check_shapes(manifest: Manifest, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `CacheFileError` unless these are the tensors that a manifest lists."""
    found = _shapes(tensors)
    for name in sorted(found.keys() | manifest.shapes.keys()):
        if found.get(name) != manifest.shapes.get(name):
            listed, held = shown(manifest.shapes.get(name)), found.get(name)
            raise CacheFileError(
                f"{path} does not hold the tensors that {MANIFEST} lists: shapes.{name[:80]} is {listed}, found {held}"
            )


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    return {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in tensors.items()}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
