"""What a model carries for its caches: saved, loaded and shared as PEFT adapters.

Only `lowrank`, `retaining_peft`, `dmc_peft` and `attach` need PEFT; everything else reads and writes the same files
without it.
"""

from __future__ import annotations

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

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME, globals())
