"""Small tensors on their way to and from a device, for which nobody waits."""

from __future__ import annotations

import torch


class Landing:
    """A copy of a tensor on the CPU, once it has arrived there.

    Args:
        source: on any device; what is written to it later is not seen.
    """

    def __init__(self, source: torch.Tensor):
        self._event = None
        if source.device.type != "cuda":
            self.values = source.to("cpu", copy=True)
            return
        self.values = page_locked(source)
        self.values.copy_(source, non_blocking=True)
        self._event = event_of(source.device)

    @property
    def has_arrived(self) -> bool:
        """Whether `values` can be read; does not wait."""
        return self._event is None or self._event.query()

    def __deepcopy__(self, memo) -> None:
        """None: a copy of what expects it can do without, as it can until it has arrived."""


def sent_to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on a device, for what is asked of that device from now on."""
    if device.type != "cuda":
        return values.to(device)
    return page_locked(values).copy_(values).to(device, non_blocking=True)


def page_locked(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor on the CPU that a device can read and write by itself."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def event_of(device: torch.device) -> torch.cuda.Event:
    """What happens on a CUDA device once all that it was asked for until now is done."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
