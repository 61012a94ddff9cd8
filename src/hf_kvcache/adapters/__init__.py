"""What a model carries for its caches: saved, loaded and shared as PEFT adapters.

Only `lowrank`, `retaining_peft`, `dmc_peft` and `attach` need PEFT; everything else reads and writes the same files
without it.
"""

from __future__ import annotations

from importlib import import_module

from hf_kvcache.lazy import lazily

# the function `decompose` is not among them: the submodule of that name would hide it
_HOME = {
    "AdapterError": "errors",
    "Bases": "bases",
    "DMCConfig": "dmc_peft",
    "DMCModel": "dmc_peft",
    "LowRankKVConfig": "lowrank",
    "LowRankKVModel": "lowrank",
    "LowRankLinear": "decompose",
    "RetainingHeadConfig": "retaining_peft",
    "RetainingHeadModel": "retaining_peft",
    "RetainingHeads": "retaining",
    "attach": "attaching",
    "attached_basis": "modules",
    "attached_heads": "modules",
    "attached_retrofit": "modules",
    "load_decomposed": "decompose",
    "save_adapter": "dmc_files",
}

__all__ = sorted([*_HOME, "register"])
__getattr__ = lazily(__name__, _HOME, globals())


def register() -> bool:
    """Make our kinds of adapters known to PEFT, and by it to transformers; with `hf_kvcache`, importing PEFT does.

    Returns:
        Whether PEFT is there, and one that we know.
    """
    try:
        for module in ("lowrank", "retaining_peft", "dmc_peft"):
            import_module(f"{__name__}.{module}")
    # it is optional, so a broken one breaks nothing else; `attach` says what is wrong with it
    except Exception:
        return False
    return True
