"""A cache that outlives its process or travels to another one: folders, pickles, copies."""

from __future__ import annotations

import os
from pathlib import Path

from hf_kvcache.copying import twin


class Saving:
    """Mixed into a cache. What writes and reads is imported when it is asked for: most caches never are."""

    def save(self, directory: str | os.PathLike) -> Path:
        """Write the cache to a folder, atomically; `KVCache.load` goes on from there, and this cache goes on as it was.

        Written are the rows in use of every layer, what policies and codecs remember, what still waits to be evicted or
        packed, the options of the cache and a fingerprint of the model. Bases that were given as `LowRank(bases=...)`
        stay behind: the rows of this text go on without them, another text does not. Under tensor parallelism every
        process writes a folder of its own, and reads it again.

        Returns:
            The folder, with `manifest.json` and one safetensors file.

        Raises:
            ValueError: a forward pass is under way, the model that filled the cache is gone, or something that the
                cache holds cannot be written down.
        """
        from hf_kvcache import persist

        return persist.save(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike, model=None, device=None):
        """Read a cache that `save` wrote; the continuation is the same as without saving.

        Files are read as data: nothing in them is run, and everything is checked before a cache is made of it. The
        cache is of the class that was saved; `offloading` is only taken up on a GPU.

        Args:
            directory: the folder.
            model: the model to check against and to take the device from. Models with sliding-window layers need it;
                without it the check happens at the first forward pass.
            device: where to put the tensors.

        Raises:
            CacheFileError: files are missing, truncated, altered, contradict each other, are of another format version
                or of another model; the message names file and field.
        """
        from hf_kvcache import persist

        return persist.load(cls, directory, model, device)

    @classmethod
    def from_config(cls, config, model_config=None, **options):
        """A new, empty cache of a `KVCacheConfig`.

        Args:
            config: that, its `to_dict()`, or where it was saved.
            model_config: of the model; only models with layers of linear attention need it.
            options: further arguments of `KVCache`, such as `offloading`.

        Raises:
            ConfigError: it says something impossible, or is not there; names the field.
        """
        from hf_kvcache.cache_config import KVCacheConfig

        if isinstance(config, dict):
            config = KVCacheConfig.from_dict(config)
        elif not isinstance(config, KVCacheConfig):
            config = KVCacheConfig.load(config)
        return config.build(model_config, **options)

    def __reduce__(self):
        # as DynamicCache travels: `pickle`, `torch.save`, `multiprocessing`
        from hf_kvcache import pickling

        return pickling.reduced(self)

    def __deepcopy__(self, memo: dict):
        return twin(self, memo)
