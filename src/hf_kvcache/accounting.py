"""Bytes of a cache: storages that exist."""

from __future__ import annotations

from hf_kvcache import compat


class Accounting:
    """Mixed into a cache: what its layers take, and what a dense cache would."""

    # rows of our layers are in a store; other layers are transformers' own

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers: storages that exist, spare rows and metadata included."""
        ropes = set().union(*(layer.ropes for layer in self.layers if hasattr(layer, "store")))
        layers = [layer.nbytes if hasattr(layer, "store") else compat.hf_nbytes(layer) for layer in self.layers]
        return sum(layers) + sum(rope.nbytes for rope in ropes)

    @property
    def nbytes_dense(self) -> int:
        """Bytes that a dense cache of the same tokens would hold."""
        return sum(layer.nbytes_dense if hasattr(layer, "store") else compat.hf_nbytes(layer) for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """`nbytes_dense / nbytes`; 1.0 for an empty cache."""
        return self.nbytes_dense / self.nbytes if self.nbytes else 1.0

    def report(self) -> list[dict]:
        """One row per layer: class, tokens seen, rows kept, bytes, bytes of a dense cache."""
        return [
            {
                "layer": i,
                "class": type(layer).__name__,
                "tokens_seen": layer.get_seq_length() if hasattr(layer, "get_seq_length") else None,
                "n_kept": layer.store.n_kept if hasattr(layer, "store") else None,
                "nbytes": layer.nbytes if hasattr(layer, "store") else compat.hf_nbytes(layer),
                "nbytes_dense": layer.nbytes_dense if hasattr(layer, "store") else compat.hf_nbytes(layer),
            }
            for i, layer in enumerate(self.layers)
        ]
