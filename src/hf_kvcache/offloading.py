"""Layers that wait in CPU memory for their turn on the GPU."""

from __future__ import annotations

import torch


class Offloading:
    """Mixed into a cache of transformers that moves its layers: each one away once it has compressed."""

    def offload_layer(self, layer_idx: int) -> None:
        """Called once a layer has compressed: its bytes may leave the GPU now."""
        if self.layers[layer_idx].device.type == "cuda":
            self.offload(layer_idx, self.only_non_sliding)

    def _prefetch_ahead(self, layer_idx: int, device: torch.device) -> None:
        default = torch.cuda.default_stream(device)
        default.wait_stream(self.prefetch_stream)
        self.prefetch_stream.wait_stream(default)
        self.layers[layer_idx].prefetch()
        self.prefetch(layer_idx + 1, self.only_non_sliding)
