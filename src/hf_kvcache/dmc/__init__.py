"""DMC and DMS: models that decide for themselves which tokens keep a row, trained and served."""

from __future__ import annotations

# its policies are among those of that package, which has to come first
import hf_kvcache.policies  # noqa: F401
from hf_kvcache.lazy import lazily

_HOME = {
    "Retrofit": "retrofitting",
    "Settings": "settings",
    "compression_off": "training",
    "decide": "decisions",
    "draw_noise": "training",
    "load": "files",
    "merge": "merging",
    "merge_weights": "training",
    "retrofit": "retrofitting",
    "retrofits": "retrofitting",
    "save": "files",
    "zero_rows": "training",
}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME | {"fold": "training"}, globals())
