"""A layer as an entry of a manifest and named tensors, and back."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_kvcache.cache_options import check_pair
from hf_kvcache.codecs.base import ROWS, Codec
from hf_kvcache.codecs.chain import Chain
from hf_kvcache.codecs.fitted import layers_per_row, refit
from hf_kvcache.codecs.lowrank import LowRank
from hf_kvcache.described import SIDES, describe_pair, described_codec, described_pair
from hf_kvcache.hf_layer_entries import check_flag, check_leaves, leaves, numbers_and_tensors, put
from hf_kvcache.layer import KVLayer
from hf_kvcache.manifest import MOST_CHANNELS, LayerEntry
from hf_kvcache.rerotation import LACKS_ORIGINALS, ORIGINAL
from hf_kvcache.stateful import StatefulLayer
from hf_kvcache.stores.buffer import RowBuffer
from hf_kvcache.stores.paged import PagedBuffer
from hf_kvcache.typed import Misfit, shown

PENDING = "pending.queries"  # queries of a call whose rows wait for a `crop` or for more of the prompt
_ATTRIBUTES = ("tokens_seen", "has_padding", "evicted_at", "last_eviction_check", "record_past", "scaling", "softcap")
_FLAGS = ("is_unsettled", "is_decoding", "should_evict")
_SHAPE = ("batch_size", "n_kv_heads", "head_dim", "v_head_dim")
STATES = "states"  # prefix of the tensors of linear attention in a layer that has rows, too


def describe(layer: KVLayer) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `restore` makes a layer of again: an object for JSON, and views of the tensors in use.

    Raises:
        ValueError: a forward pass is under way.
    """
    layer.check_idle()
    store = layer.store
    entry = {"class": "KVLayer"} | {name: getattr(layer, name) for name in _ATTRIBUTES}
    entry |= {name: getattr(layer, f"_{name}") for name in _FLAGS}
    entry |= {
        "keys": None if store.keys is None else store.keys.spec(),
        "values": None if store.values is None else store.values.spec(),
        "codecs": describe_pair(layer._codecs),
        "n_tokens": {name: buffer.n_tokens for name, buffer in store.buffers().items()},
    }
    entry |= layer.described
    if layer.is_initialized:
        entry |= {name: getattr(layer, name) for name in _SHAPE} | {"dtype": str(layer.dtype).removeprefix("torch.")}
    tensors = {f"{of}.{name}": t for of, buffer in store.buffers().items() for name, t in buffer.views().items()}
    for side in SIDES:
        tensors |= {f"constants.{side}.{name}": t for name, t in store.constants(side).items()}
    if layer._queries is not None:
        tensors[PENDING] = layer._queries
    if isinstance(layer, StatefulLayer):
        entry["states"], states = numbers_and_tensors(layer, leaves(layer.states))
        tensors |= {f"{STATES}.{name}": t for name, t in states.items()}
    return entry, tensors


def restore(i: int, entry: LayerEntry, tensors: dict[str, torch.Tensor], cache, is_follower: bool = False) -> KVLayer:
    """Layer `i` of a cache, as a file describes it.

    Args:
        tensors: its own, and those of its group that it shares.
        is_follower: whether another layer of its group holds its packed rows.

    Raises:
        Misfit: entry and tensors, or entry and cache, do not go together.
    """
    where = f"layers[{i}]"
    held = tuple(described_codec(getattr(entry, side), f"{where}.{side}") for side in SIDES)
    at_reset = described_pair(entry.codecs, f"{where}.codecs") or held
    _check_codecs(held, at_reset, cache.settings_of_layer(i), where)
    if held[0] is not None:
        held = tuple(
            _with_constants(side, codec, entry, tensors, where) for side, codec in zip(SIDES, held, strict=True)
        )
    layer = empty(i, held, at_reset, cache, entry)
    if isinstance(layer, StatefulLayer) != (entry.states is not None):
        has, lacks = ("the file", "the model") if entry.states is not None else ("the model", "the file")
        raise Misfit(f"{where}.states: {has} has states of linear attention there, {lacks} none; load it with model=")
    _check_tensors(layer, entry, tensors, is_follower, where)
    if entry.states is not None:
        _check_states(layer, entry, _of(STATES, tensors), where)
    fill(layer, entry, tensors)
    return layer


def empty(i: int, held: tuple, at_reset: tuple, cache, entry: LayerEntry) -> KVLayer:
    """Layer `i` of a cache without rows.

    Args:
        held: codecs of the rows that are to come, with all that was found out about them, or a pair of None.
        at_reset: codecs of the next text.
        entry: what is known of the rows.
    """
    layer = cache.make_layer(i, at_reset)
    if held[0] is not None:
        layer.store.keys, layer.store.values = layer._held = held
    if entry.dtype is not None:
        # what is kept beside the rows goes by their dtype
        layer.keep_originals(getattr(torch, entry.dtype))
    return layer


def fill(layer: KVLayer, entry: LayerEntry, tensors: dict[str, torch.Tensor]) -> None:
    """Give an empty layer the rows and the state that `describe` found."""
    store = layer.store
    for of, buffer in store.buffers().items():
        buffer.restore(_of(of, tensors), entry.n_tokens.get(of, 0))
    if entry.dtype is not None:
        for name in _SHAPE:
            setattr(layer, name, getattr(entry, name))
        layer.dtype = store.dtype = getattr(torch, entry.dtype)
        layer.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        layer.is_initialized = True
    for name in _ATTRIBUTES:
        setattr(layer, name, getattr(entry, name))
    for name in _FLAGS:
        setattr(layer, f"_{name}", getattr(entry, name))
    layer._queries = tensors.get(PENDING)
    if isinstance(layer, StatefulLayer):
        for name, value in (entry.states | _of(STATES, tensors)).items():
            put(layer.states, name, value)
    layer.restored(entry)


def join_groups(layers: list, groups: list[list[int]]) -> None:
    """Let layers share their packed rows.

    Raises:
        Misfit: they cannot, or some have packed rows and no group.
    """
    for at, group in enumerate(groups):
        stores = [layers[i].store for i in group]
        if not all(store.shares_layers and len(group) <= layers_per_row(store.keys) for store in stores):
            raise Misfit(f"groups[{at}]: the codecs of {shown(group)} share no rows among {len(group)} layers")
        for store in stores:
            store.join(stores[0], len(group))
    for i, layer in enumerate(layers):
        store = getattr(layer, "store", None)
        if store is not None and store.shares_layers and not store.group and store.n_packed:
            raise Misfit(f"groups: layer {i} has shared rows, and is in none")
        if store is None or layer.policy is not None or not layer.is_initialized or store.n_kept == layer.tokens_seen:
            continue
        raise Misfit(f"layers[{i}].tokens_seen: {layer.tokens_seen}, where the file holds {store.n_kept} rows")


# -- codecs ----------------------------------------------------------------------------------------------------------


def _check_codecs(held, at_reset, settings, where: str) -> None:
    """Refuse codecs that the settings of the layer, or the codecs of its next text, do not go with."""
    if (held[0] is None) != (at_reset[0] is None):
        raise Misfit(f"{where}.codecs: {at_reset[0]}, where rows are held by {held[0]}")
    for side, codec, template in zip(SIDES, held, at_reset, strict=True):
        if codec is None:
            continue
        # where keys are projected is known once the model is
        if codec.format != template.format and codec.fitted_part is None:
            raise Misfit(f"{where}.codecs.{side}: {template} is not what {codec} came from")
        if layers_per_row(codec) != layers_per_row(template) or codec.fields != template.fields:
            raise Misfit(f"{where}.codecs.{side}: {template} is not what {codec} came from")
        if settings.policy is not None and settings.policy.is_ragged and codec.format not in ROWS:
            raise Misfit(f"{where}.{side}: rows of {codec} cannot be in pages")
    if held[0] is not None and layers_per_row(held[0]) != layers_per_row(held[1]):
        raise Misfit(f"{where}.values: {held[1]} shares rows among other layers than {held[0]}")
    if held[0] is not None:
        try:
            check_pair(settings, held)
        except ValueError as error:
            raise Misfit(f"{where}.keys: {str(error)[:300]}") from None


def _with_constants(side: str, codec: Codec, entry: LayerEntry, tensors: dict, where: str) -> Codec:
    constants = _of(f"constants.{side}", tensors)
    if constants and codec.fitted_part is not None:
        _check_basis(side, codec.fitted_part, entry, constants, where)
    try:
        complete = refit(codec, lambda part: part.with_constants(constants))
    except Exception as error:
        # constants that never were may break a codec anywhere
        raise Misfit(f"{where}.{side}: {str(error)[:300]}") from None
    found = {} if complete.fitted_part is None else complete.fitted_part.constants()
    if found.keys() != constants.keys():
        raise Misfit(f"{where}.{side}: {', '.join(sorted(constants))} are not the constants of {codec}")
    return complete


def _check_basis(side: str, codec: LowRank, entry: LayerEntry, constants: dict, where: str) -> None:
    path, heads, width = f"{where}.{side}", entry.n_kv_heads, entry.head_dim if side == "keys" else entry.v_head_dim
    found = {name: tuple(t.shape) for name, t in constants.items()}
    up = found.get("up", ())
    if heads is None or len(up) != 4 or not all(t.is_floating_point() for t in constants.values()):
        raise Misfit(f"{path}: {found} are no directions")
    n_groups, group_size, rank, channels = up
    whole = {"up": up, "down": (n_groups, group_size * channels, rank), "mean": (n_groups, group_size * channels)}
    if codec.share_layers > 1:
        mixed = {"down": (1, rank, rank)} if len(found.get("down", ())) == 3 else {"down": (1, rank)}
        whole |= mixed
    is_whole = {"up", "down"} <= found.keys() and all(found[name] == whole.get(name) for name in found)
    if not is_whole or n_groups * group_size != heads or channels != width:
        raise Misfit(f"{path}: {found} are no directions of {heads} heads of {width} channels")
    told = {"rank": (codec.rank, rank), "group_size": (codec.group_size, group_size)}
    for name, (said, held) in told.items():
        if isinstance(said, int) and said != held and (name == "group_size" or codec.share_layers == 1):
            raise Misfit(f"{path}.{name}: {said}, where the file holds {held}")


# -- tensors ---------------------------------------------------------------------------------------------------------


def _of(prefix: str, tensors: dict) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _check_tensors(layer: KVLayer, entry: LayerEntry, tensors: dict, is_follower: bool, where: str) -> None:
    """Refuse tensors that are not those of the entry: names, dtypes, shapes."""
    store, buffers = layer.store, layer.store.buffers()
    known = {*buffers, "constants"} | ({"pending"} if layer.policy_at_reset is not None else set())
    known |= {STATES} if isinstance(layer, StatefulLayer) else set()
    for name in tensors:
        if name.split(".", 1)[0] not in known:
            raise Misfit(f"{where}: tensor {name} belongs to nothing")
    for of in entry.n_tokens:
        if of not in buffers:
            raise Misfit(f"{where}.n_tokens.{shown(of)[1:-1]}: there is no such buffer")
    if entry.dtype is None:
        if any(not name.startswith(("constants.", f"{STATES}.")) for name in tensors):
            raise Misfit(f"{where}.dtype is missing, and there are rows")
        return
    dtype = getattr(torch, entry.dtype)
    lead, widths = (entry.batch_size, entry.n_kv_heads), (entry.head_dim, entry.v_head_dim)
    if ORIGINAL in store.tracked and "dense.k" in tensors and f"dense.{ORIGINAL}" not in tensors:
        raise Misfit(f"{where}: {LACKS_ORIGINALS}")
    tracked = {name: (of, (entry.head_dim,) if name in store.wide else ()) for name, of in store.tracked.items()}
    rows = {side: (dtype, (width,)) for side, width in zip("kv", widths, strict=True)}
    rows = tracked | (rows if buffers["dense"].tokens_per_row else {})
    encoded = dict(tracked)
    for side, codec, width in zip("kv", (store.keys, store.values), widths, strict=True):
        if codec is not None and _of("packed", tensors):
            if codec.fitted_part is not None and codec.fitted_part.is_unfitted:
                raise Misfit(f"{where}: rows are packed, and the directions that they were packed with are missing")
            encoded |= {f"{side}.{name}": like for name, like in _encoded_like(codec, entry, width, where).items()}
    for of, buffer in buffers.items():
        own, n = _of(of, tensors), entry.n_tokens.get(of, 0)
        path = f"{where}.n_tokens.{of}"
        if not own:
            if n and not (of == "packed" and is_follower):
                raise Misfit(f"{path}: {n}, and the file holds none")
            continue
        if isinstance(buffer, PagedBuffer):
            _check_pages(own, buffer, n, lead, encoded, f"{where}.{of}", path)
        else:
            expected = {"dense": rows, "packed": encoded}.get(of, {})
            _check_rows(own, buffer, n, lead, expected, f"{where}.{of}", path)
    if layer.store.buffers()["dense"].tokens_per_row and not _of("dense", tensors):
        raise Misfit(f"{where}.dtype: {entry.dtype}, and the file holds no rows")
    pending = tensors.get(PENDING)
    if pending is not None and (pending.dim() != 4 or pending.shape[0] != lead[0] or pending.shape[1] % lead[1]):
        raise Misfit(f"{where}: {PENDING} {list(pending.shape)} are no queries of {lead[1]} heads")


def _check_rows(own: dict, buffer: RowBuffer, n: int, lead: tuple, expected: dict, where: str, path: str) -> None:
    names = buffer.tokens_per_row
    if names and own.keys() != names.keys():
        odd = sorted(own.keys() ^ names.keys())
        raise Misfit(f"{where}: {', '.join(odd)} are too many tensors or too few")
    if n % buffer.unit:
        raise Misfit(f"{path}: {n} is no multiple of {buffer.unit}")
    for name, t in own.items():
        dtype, tail = expected.get(name, (None, None))
        n_rows = n // names.get(name, 1)
        if t.dim() < 3 or t.shape[0] != lead[0] or t.shape[2] != n_rows:
            raise Misfit(f"{path}: {n}, where {name} is {list(t.shape)} for a batch of {lead[0]}")
        if name in expected and (t.dtype != dtype or (tail is not None and tuple(t.shape[3:]) != tail)):
            raise Misfit(f"{where}.{name}: {t.dtype} {list(t.shape)} are no rows of {dtype} {list(tail or ())}")
        is_shared = name == "position_ids" or name.endswith("latents") or name.startswith(("k.second.", "v.second."))
        if t.shape[1] != lead[1] and not is_shared:
            raise Misfit(f"{where}.{name}: {t.shape[1]} heads, where n_kv_heads is {lead[1]}")


def _check_pages(own: dict, buffer: PagedBuffer, n: int, lead: tuple, expected: dict, where: str, path: str) -> None:
    if own.keys() != {*buffer.fields, "counts"}:
        raise Misfit(f"{where}: {', '.join(sorted(own.keys() ^ {*buffer.fields, 'counts'}))} are too many or too few")
    counts = own["counts"]
    if counts.dtype != torch.long or tuple(counts.shape) != lead:
        raise Misfit(f"{where}.counts: {counts.dtype} {list(counts.shape)} are no counts of {list(lead)} heads")
    n_rows = own[buffer.fields[0]].shape[0] if own[buffer.fields[0]].dim() else -1
    # no count may be larger than all of them before their sum is taken
    if int(counts.min()) < 0 or int(counts.max()) > n_rows or int(counts.sum()) != n_rows or int(counts.max()) != n:
        raise Misfit(f"{path}: {n}, where counts are of {n_rows} rows and {int(counts.max())} for the longest head")
    for name in buffer.fields:
        dtype, tail = expected[name]
        if own[name].dtype != dtype or tuple(own[name].shape) != (n_rows, *tail):
            raise Misfit(f"{where}.{name}: {own[name].dtype} {list(own[name].shape)} are not {n_rows} rows of {dtype}")


def _encoded_like(
    codec: Codec, entry: LayerEntry, width: int, where: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape behind the rows of what a codec makes of rows of `width` channels."""
    what = f"{entry.n_kv_heads} heads of {width} channels"
    if entry.n_kv_heads * width > MOST_CHANNELS:
        raise Misfit(f"{where}: {what} are more than any model has")
    try:
        return _probe(codec, entry.n_kv_heads, width, entry.dtype)
    except Exception as error:
        # settings that never were may break a codec anywhere
        raise Misfit(f"{where}: {what} cannot be encoded by {codec}: {str(error)[:300]}") from None


@lru_cache(maxsize=256)
def _probe(codec: Codec, n_kv_heads: int, head_dim: int, dtype: str) -> dict:
    row = torch.zeros(1, n_kv_heads, codec.granularity, head_dim, dtype=getattr(torch, dtype))
    codec.check(row)
    return {name: (t.dtype, tuple(t.shape[3:])) for name, t in _encode(codec, row).items()}


def _encode(codec: Codec, row: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(codec, Chain):
        encoded = _encode(codec.first, row)
        payload = _encode(codec.second, encoded.pop(codec.first.payload))
        return encoded | {f"second.{name}": t for name, t in payload.items()}
    if isinstance(codec, LowRank):
        # its directions are constants, and whatever they are they give this
        return {"latents": row.new_zeros(1, max(row.shape[1] // codec.group_size, 1), row.shape[2], codec.rank)}
    return codec.encode(row, row[:, :, :1].unsqueeze(3))


def _check_states(layer: StatefulLayer, entry: LayerEntry, tensors: dict, where: str) -> None:
    """Refuse states of linear attention that are not those of a layer and its rows."""
    known = dict(leaves(layer.states))
    check_leaves(known, entry.states | tensors, type(layer).__name__, f"{where}.{STATES}")
    for name in known:
        kind, _, at = name.partition(".")
        if kind in ("conv_states", "recurrent_states"):
            flag = f"is_{kind}_initialized.{at}"
            check_flag(entry.states, flag, name, tensors, f"{where}.{STATES}")
    for name, t in tensors.items():
        if not t.dim() or entry.batch_size not in (None, t.shape[0]):
            raise Misfit(f"{where}.{STATES}.{name}: {list(t.shape)}, where batch_size is {entry.batch_size}")
