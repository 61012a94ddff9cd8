"""transformers' own caches, under the names that the command line gives them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import time

from transformers import DynamicCache, QuantizedCache, cache_utils


def dynamic(config=None) -> DynamicCache:
    """The default of `generate`: the baseline of every ratio."""
    return DynamicCache(config=config)


def quanto(config=None, bits: int = 4, group_size: int = 64, window: int = 128) -> QuantizedCache:
    """`QuantizedCache` on optimum-quanto, with transformers' defaults."""
    _refuse_stale_lock()
    return QuantizedCache("quanto", config, nbits=bits, q_group_size=group_size, residual_length=window)


def hqq(config=None, bits: int = 4, group_size: int = 64, window: int = 128, axis: int = 0) -> QuantizedCache:
    """`QuantizedCache` on hqq, with transformers' defaults: its groups are strided over the whole tensor.

    `axis=1` groups within a token, but packs only as many rows as divide evenly: with an odd number of KV heads it
    fails at every other length.
    """
    return QuantizedCache(
        "hqq", config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group_size, residual_length=window
    )


def fp8(config=None) -> QuantizedCache:
    """`QuantizedCache` in 8-bit floating point, one scale per layer and side, of the first prompt.

    Raises:
        RuntimeError: this transformers does not have it.
    """
    if not is_installed("fp8"):
        raise RuntimeError("this transformers has no QuantizedCache in fp8: it came with 5.21")
    return QuantizedCache("fp8", config)


PEERS = {"dynamic": dynamic, "quanto": quanto, "hqq": hqq, "fp8": fp8}

# its extension compiles in less than this
STALE_S = 300

_MODULES = {"quanto": "optimum", "hqq": "hqq"}


def is_installed(name: str) -> bool:
    """Whether the package behind a peer can be imported, or transformers has it."""
    if name == "fp8":
        return hasattr(cache_utils, "Fp8QuantizedLayer")
    return name not in _MODULES or find_spec(_MODULES[name]) is not None


def _refuse_stale_lock() -> None:
    """optimum-quanto waits for ever for a build that was interrupted: raise instead, and say what to delete."""
    from optimum.quanto.library import extensions

    for lock in Path(extensions.__file__).parent.glob("*/build/lock"):
        age = time() - lock.stat().st_mtime
        if age > STALE_S:
            raise RuntimeError(f"optimum-quanto waits for {lock}, {age / 60:.0f} minutes old; delete that file")
