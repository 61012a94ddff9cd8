"""transformers' own layers in a cache of ours: what a sliding window or linear attention is held in."""

from __future__ import annotations

from hf_kvcache.compat import CacheLayerMixin, DynamicLayer, LinearAttentionLayer


def crop_all(layers: dict[int, CacheLayerMixin], tokens_to_remove: int) -> None:
    """Forget the newest `-tokens_to_remove` tokens in all layers, by their numbers, or raise and change none.

    Raises:
        ValueError: states cannot be taken back, or a window has moved on.
    """
    for i, layer in layers.items():
        if tokens_to_remove and isinstance(layer, LinearAttentionLayer):
            check_states_crop(layer, f"layer {i}")
    # they change nothing but their attributes, and dictionaries among those
    before = [
        (layer, {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()})
        for layer in layers.values()
    ]
    try:
        for layer, _ in before:
            # of linear attention alone: those with a window crop that, too
            crop = crop_states if type(layer) is LinearAttentionLayer else type(layer).crop
            crop(layer, tokens_to_remove)
    except Exception:
        for layer, attributes in before:
            vars(layer).update(attributes)
        raise


def drop_rows(layer) -> None:
    """Finish the `reset()` of transformers' own layer, so that another batch may come.

    5.17 zeroes the rows where newer releases drop them; states of linear attention are zeroed by all.
    """
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys = layer.values = None
        layer.is_initialized = False
    if isinstance(layer, LinearAttentionLayer):
        drop_states(layer)


def linear_states(layer: LinearAttentionLayer) -> dict[str, dict]:
    """All that a layer holds of its states of linear attention: dictionaries by the number of the state."""
    fresh = vars(LinearAttentionLayer())
    return {name: value for name, value in vars(layer).items() if isinstance(fresh.get(name), dict)}


def drop_states(layer: LinearAttentionLayer) -> None:
    """Make the states of a layer what they were before the first token."""
    fresh = vars(LinearAttentionLayer(number_of_states=layer.number_of_states))
    vars(layer).update({name: value for name, value in fresh.items() if name != "record_past"})


def check_states_crop(layer: LinearAttentionLayer, where: str) -> None:
    """Raise ValueError unless the states of a layer can be taken back.

    transformers crops what it has of a convolution and leaves a recurrent state as it was.
    """
    if any(layer.is_recurrent_states_initialized.values()):
        raise ValueError(
            f"{where}: recurrent states of linear attention hold all tokens so far and cannot be taken back; "
            "copy.deepcopy(cache) before what may have to be"
        )
    if not layer.record_past and any(layer.is_conv_states_initialized.values()):
        raise ValueError(
            f"{where}: states of linear attention cannot be taken back unless they were recorded; "
            "call activate_past_recording() before"
        )


def crop_states(layer: LinearAttentionLayer, tokens_to_remove: int) -> None:
    """Take the newest `-tokens_to_remove` tokens out of the states of a layer, which `check_states_crop` has let."""
    if layer.record_past and any(layer.is_conv_states_initialized.values()):
        LinearAttentionLayer.crop(layer, tokens_to_remove)


def batch_size_of(layer) -> int:
    """Rows of the batch that one of transformers' own layers holds; -1 before the first token."""
    held = [getattr(layer, "keys", None)]
    if isinstance(layer, LinearAttentionLayer):
        held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    # an empty layer may have tensors without rows
    return next((t.shape[0] for t in held if t is not None and t.dim() > 1), -1)
