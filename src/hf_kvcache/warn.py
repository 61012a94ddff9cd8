"""Warnings that are said once per process, and name the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

import torch

# frames that are not the user's: ours, under whatever name this file was exported, and those that call us
_PASSED = {__name__.partition(".")[0], "accelerate", "hf_kvcache", "peft", "torch", "transformers"}
_said: set[str] = set()


# what `torch.compile` traces says it then, and goes on without a break
@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """Warn as from the innermost line that is neither ours nor that of PyTorch, transformers, PEFT or Accelerate.

    Args:
        message: what is said as "hf_kvcache: `message`"; a message that was said before is not said again, wherever it
            comes from and whatever the filters are.
    """
    if message not in _said:
        _said.add(message)
        warnings.warn(f"hf_kvcache: {message}", stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` of a warning in the calling function; that of the outermost frame where all are passed over."""
    frame, level = sys._getframe(1), 1
    while _is_passed(frame) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level


def _is_passed(frame) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED
