"""DMC and DMS: models that decide for themselves which tokens keep a row, trained and served."""

from __future__ import annotations

from hf_kvcache.lazy import lazily

_HOME = {
    "Retrofit": "retrofitting",
    "Settings": "settings",
    "compression_off": "retrofitting",
    "decide": "decisions",
    "draw_noise": "retrofitting",
    "load": "files",
    "merge": "merging",
    "merge_weights": "retrofitting",
    "retrofit": "retrofitting",
    "retrofits": "retrofitting",
    "save": "files",
    "zero_rows": "retrofitting",
}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME | {"fold": "retrofitting"}, globals())
