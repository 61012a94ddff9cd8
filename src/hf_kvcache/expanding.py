"""Models that compute with the rows of a cache themselves, before they call attention or instead of calling it."""

from __future__ import annotations

from hf_kvcache.handed import Handed, note_lender
from hf_kvcache.view import KVView


def check_expandable(layer) -> None:
    """Raise ValueError unless a model may compute with the rows of `layer` itself, before it calls attention."""
    policy, codecs = layer.policy_at_reset, layer.codecs
    name, shown = type(policy).__name__, " and ".join(sorted({str(codec) for codec in codecs}))
    needs = frozenset().union(*(codec.needs for codec in codecs))
    refused = {
        f"{name} goes by the decisions of the model": policy is not None and policy.is_trained,
        f"{name} scores rows by queries, which do not fit latents": policy is not None
        and (policy.n_queries or policy.wants_queries),
        f"{name} takes something of the model's keys and values": policy is not None and "model" in policy.needs,
        f"{name} merges rows": policy is not None and policy.merges_evicted,
        f"{shown} goes by queries, which do not fit latents": "queries" in needs,
        f'{shown} takes RoPE off keys; use LowRank(rope="post")': "positions" in needs,
        "exact_prefill=False changes new rows before attention": not layer.exact_prefill,
        "rerotate_keys=True rotates keys": layer.rerotate_keys,
    }
    for why, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"layer {layer.layer_idx}: this model computes with keys and values between cache and attention "
                f"(latents that it expands, or an attention of its own), and {why}"
            )


def check_served(layer, edge_layers: int, knows_model: bool) -> None:
    """Raise ValueError where a model has read the rows of `layer` and never calls attention, which would be needed.

    Args:
        edge_layers: of the cache.
        knows_model: whether the cache has learned which layers the model has.
    """
    refused = [type(layer.policy).__name__] if layer.policy is not None else []
    refused += [codec for codec in layer.codecs if layer.needs_model and "model" in codec.needs]
    refused += [f"edge_layers={edge_layers}"] if edge_layers and not knows_model else []
    if refused:
        raise ValueError(
            f"layer {layer.layer_idx}: the attention of this model reads keys and values itself instead of calling "
            f"a function of transformers' registry, so {refused[0]} cannot be served: use a cache that keeps all "
            "tokens and asks nothing of the model, such as KVCache(), QuantCache(8) or SparseCache(0.5)"
        )


class Lending:
    """Mixed into a cache: rows that a model has got as tensors, until attention is called with what it made of them.

    Attributes:
        handed: what attention has not been called with yet, or None.
    """

    handed: Handed | None = None

    def hand_out(self, view: KVView) -> None:
        """A model computes with the rows of `view` itself, before it calls attention or instead of calling it.

        Raises:
            ValueError: the layer needs the queries, the positions or the features of the model, which come too late.
        """
        check_expandable(view.layer)
        self.handed = Handed(view.layer.layer_idx, view.n_new, view.is_prefill)
        note_lender(self)
        view.layer.defer()

    def take_back(self) -> KVView:
        """Attention has been called with what was handed out: the view of that layer."""
        (layer_idx, n_new, is_prefill), self.handed = self.handed, None
        layer = self.layers[layer_idx]
        view = KVView(layer, *(layer.store.dense[side][:, :, -n_new:] for side in "kv"), is_prefill)
        view.cache = self
        return view

    def _end_handing_out(self) -> None:
        """The next rows come: a layer whose tensors no attention function has got is of a model with its own."""
        layer, self.handed = self.layers[self.handed.layer_idx], None
        check_served(layer, self.edge_layers, self._hf_layers is not None)
