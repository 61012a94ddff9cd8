"""What a manifest of a saved cache must say: declared, and checked as a whole before anything is built from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hf_kvcache.former_files import manifest_of_today
from hf_kvcache.typed import Misfit, build, refuse_depth, shown

FORMAT_VERSION = 3
# files of format 1 say less: what is missing has a default; those of formats 1 and 2 have other words for some things
READ_VERSIONS = (1, 2, FORMAT_VERSION)
DEEPEST = 24  # lists and objects within each other
MOST_TOKENS = 2**31 - 1  # positions are int32
MOST_CHANNELS = 2**18  # of one token in one layer
DTYPES = ("float16", "bfloat16", "float32", "float64")
TENSORS_NAME = re.compile(r"cache-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class HFLayerEntry:
    """One of transformers' own layers.

    Attributes:
        kind: its class ("class" in the file).
        state: numbers and flags by attribute; `name.i` for entry `i` of a dictionary.
    """

    kind: str = field(metadata={"key": "class"})
    state: dict[str, bool | int]


@dataclass(frozen=True)
class LayerEntry:
    """One of our layers.

    Attributes:
        kind: "KVLayer" ("class" in the file).
        keys, values: codecs of the rows that are held, as `spec()` described them, or None.
        n_tokens: rows in use of every buffer.
        codecs: what a new text begins with after `reset()`, see `described.PairEntry`, or None for `keys` and `values`.
        batch_size, n_kv_heads, head_dim, dtype: of the rows; None before the first.
        v_head_dim: of the values; None in files of earlier releases, where it is `head_dim`.
        window: that a retrofitted model made them with.
        states: of linear attention in the same layer, as in `HFLayerEntry.state`; None for layers without.
        the others: attributes of `KVLayer`.
    """

    kind: str = field(metadata={"key": "class"})
    keys: dict | None
    values: dict | None
    n_tokens: dict[str, int]
    tokens_seen: int
    has_padding: bool = False
    evicted_at: int | None = None
    last_eviction_check: int = 0
    codecs: dict | None = None
    batch_size: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    dtype: str | None = None
    record_past: bool = False
    is_unsettled: bool = False
    is_decoding: bool = False
    should_evict: bool = False
    scaling: float = 1.0
    softcap: float | None = None
    window: int | None = None
    states: dict[str, bool | int] | None = None

    def __post_init__(self):
        _refuse_outside(self, ("tokens_seen", "last_eviction_check", "evicted_at", "window"), 0, MOST_TOKENS)
        _refuse_outside(self, ("batch_size", "n_kv_heads", "head_dim", "v_head_dim"), 1, MOST_TOKENS)
        for name, n in self.n_tokens.items():
            if not 0 <= n <= MOST_TOKENS:
                raise Misfit(f"n_tokens.{shown(name)}: {n} is no number of rows")
        shape = self.batch_size, self.n_kv_heads, self.head_dim, self.dtype
        if (self.keys is None) != (self.values is None):
            raise Misfit("keys, values: one side has a codec and the other has none")
        if None in shape and shape != (None,) * 4:
            raise Misfit("batch_size, n_kv_heads, head_dim and dtype belong together, and one is missing")
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        if self.dtype is None:
            if self.v_head_dim is not None:
                raise Misfit(f"v_head_dim: {self.v_head_dim}, and no dtype of any row")
            if self.tokens_seen or any(self.n_tokens.values()):
                raise Misfit(f"tokens_seen: {self.tokens_seen}, and no dtype of any row")
            return
        if self.dtype not in DTYPES:
            raise Misfit(f"dtype: {shown(self.dtype)} is none of {', '.join(DTYPES)}")
        for name in ("head_dim", "v_head_dim"):
            width = getattr(self, name)
            if self.n_kv_heads * width > MOST_CHANNELS:
                raise Misfit(f"{name}: {self.n_kv_heads} heads of {width} channels are more than any model has")

    @property
    def nbytes_dense(self) -> int:
        """Bytes of a dense cache of the tokens seen."""
        if not self.tokens_seen:
            return 0
        itemsize = 2 if self.dtype in ("float16", "bfloat16") else 4 if self.dtype == "float32" else 8
        return self.batch_size * self.tokens_seen * self.n_kv_heads * (self.head_dim + self.v_head_dim) * itemsize


@dataclass(frozen=True)
class Manifest:
    """All that a manifest says.

    Attributes:
        format_version: of the files.
        kind: class of the cache ("class" in the file).
        model: fingerprint of the model, or None where no model has filled the cache.
        codec, edge_codec: see `described.PairEntry`.
        per_layer: options of single layers by their index, see `described.LayerOptions`.
        attributes: what the class of the cache has beside the options of `KVCache`.
        records_past: whether `activate_past_recording` was called.
        tensors: name of the file that holds the tensors.
        sha256: its checksum.
        shapes: dtype and shape of every tensor in it.
        layers: a `LayerEntry` or a `HFLayerEntry` for every layer.
        groups: layers that share their packed rows.
        the others: arguments of `KVCache`.
    """

    format_version: int
    kind: str = field(metadata={"key": "class"})
    model: dict[str, str | int | None] | None
    policy: dict | None
    window: int
    n_sink: int
    max_length: int | None
    nbytes_dense: int
    tensors: str
    sha256: str
    shapes: dict[str, list]
    layers: list[dict]
    groups: list[list[int]] = field(default_factory=list)
    min_length: int = 0
    exact_prefill: bool = True
    rerotate_keys: bool = False
    codec: dict | None = None
    edge_codec: dict | None = None
    edge_layers: int = 0
    per_layer: dict[str, dict] = field(default_factory=dict)
    offloading: bool = False
    records_past: bool = False
    attributes: dict[str, bool | int | float | str | None] = field(default_factory=dict)

    def __post_init__(self):
        names = ("window", "n_sink", "min_length", "edge_layers", "max_length")
        _refuse_outside(self, names, 0, MOST_TOKENS)
        if not TENSORS_NAME.fullmatch(self.tensors):
            raise Misfit(f"tensors: {shown(self.tensors)} is a name that no cache would write")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256) or self.sha256[:16] not in self.tensors:
            raise Misfit(f"sha256: {shown(self.sha256)} is not the checksum in the name of tensors, {self.tensors}")
        entries = [read_entry(raw, i) for i, raw in enumerate(self.layers)]
        object.__setattr__(self, "layers", entries)
        seen = [i for group in self.groups for i in group]
        for at, group in enumerate(self.groups):
            if not group or group != sorted(set(group)) or not 0 <= group[0] <= group[-1] < len(entries):
                raise Misfit(f"groups[{at}]: {shown(group)} are no layers of this cache in their order")
            if any(not isinstance(entries[i], LayerEntry) for i in group):
                raise Misfit(f"groups[{at}]: {shown(group)} has layers that share nothing")
        if len(set(seen)) < len(seen):
            raise Misfit("groups: a layer is in two of them")
        ours = [entry for entry in entries if isinstance(entry, LayerEntry)]
        told, found = self.nbytes_dense, sum(entry.nbytes_dense for entry in ours)
        # the bytes of transformers' own layers are not ours to say
        if told < found or (len(ours) == len(entries) and told != found):
            raise Misfit(f"nbytes_dense: {told} is not the {found} bytes of the tokens that the layers have seen")

    @property
    def followers(self) -> set[int]:
        """Layers whose packed rows another one holds."""
        return {i for group in self.groups for i in group[1:]}


def read_manifest(raw) -> Manifest:
    """The manifest in an object of JSON.

    Raises:
        Misfit: some field is missing, unknown, of another type, or cannot be.
    """
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise Misfit("format_version is missing")
    version = raw["format_version"]
    if isinstance(version, bool) or version not in READ_VERSIONS:
        raise Misfit(f"has format {shown(version)}, this release reads {', '.join(map(str, READ_VERSIONS))}")
    refuse_depth(raw, DEEPEST)
    raw = raw if version == FORMAT_VERSION else manifest_of_today(raw)
    try:
        return build(Manifest, raw, "")
    except Misfit as error:
        raise Misfit(str(error).removeprefix(":").removeprefix(".").strip()) from None


def read_entry(raw, i: int) -> LayerEntry | HFLayerEntry:
    """The entry of layer `i`; raises `Misfit` as `read_manifest`."""
    where = f"layers[{i}]"
    is_ours = isinstance(raw, dict) and raw.get("class") == "KVLayer"
    try:
        return build(LayerEntry if is_ours else HFLayerEntry, raw, where)
    except Misfit as error:
        text = str(error)
        raise Misfit(text if text.startswith(where) else f"{where}.{text}") from None


def dense_bytes(layers: list[dict]) -> int:
    """Bytes of a dense cache of the tokens that layers of ours, as the manifest describes them, have seen."""
    entries = [read_entry(raw, i) for i, raw in enumerate(layers)]
    return sum(entry.nbytes_dense for entry in entries if isinstance(entry, LayerEntry))


def _refuse_outside(entry, names: tuple[str, ...], least: int, most: int) -> None:
    for name in names:
        value = getattr(entry, name)
        if value is not None and not least <= value <= most:
            raise Misfit(f"{name}: {value} is not between {least} and {most}")
