"""What makes a model of transformers take a cache of ours unasked: mixed into its classes."""

from __future__ import annotations

import functools
import inspect

import torch

from hf_kvcache.compat import CACHE_NAME, cache_argument, given_cache, named_cache
from hf_kvcache.hub.adapter_modules import add_modules
from hf_kvcache.hub.spec import cache_of


class TakesCache:
    """Mixed into a base model: takes what its `new_cache()` makes where transformers would make a cache of its own."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if given_cache(model_kwargs) is None and generation_config.use_cache is not False:
            kind = generation_config.cache_implementation
            # "hybrid" is what configs of sliding-window models used to say for the usual cache
            if kind not in (None, "dynamic", "hybrid"):
                raise ValueError(
                    f"cache_implementation={kind!r}: {type(self).__name__} can only keep its rows in a cache of ours; "
                    f"leave it out, or pass {CACHE_NAME}={type(self.new_cache()).__name__}(...)"
                )
            model_kwargs |= cache_argument(self.new_cache())
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # there is nothing to initialise but what is of transformers, which in other code does not let a module fill in
        # the buffers of others
        return False


class CacheModel(TakesCache):
    """Mixed into the model of a repository: its config says what its cache is, as `kv_cache` and `kv_adapter`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # what is fitted or trained beside the model is as precise as it was made
        theirs = cls._keep_in_fp32_modules_strict or ()
        cls._keep_in_fp32_modules_strict = {"kv_lowrank", "kv_retain", *theirs}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # damaged ones are found now
        self.new_cache()
        add_modules(self, config.kv_adapter)

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info: bool = False, **kwargs):
        """Load as any model is loaded; what its cache needs must be among the weights.

        Raises:
            ValueError: it is not.
        """
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        missing = [name for name in info["missing_keys"] if ".kv_" in name]
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of its cache, such as {min(missing)}")
        return (model, info) if output_loading_info else model

    def new_cache(self):
        """The cache that goes with this model, empty."""
        config = self.config.get_text_config(decoder=True)
        if not isinstance(config.kv_cache, dict):
            raise ValueError(f"kv_cache of the config does not describe a cache: {config.kv_cache!r:.80}")
        return cache_of(config.kv_cache, config=config)


def with_cache(base: type):
    """A base model's forward that makes our cache where it would make a `DynamicCache`.

    A cache that is given, under either of its names or by its place, is used.

    Raises:
        TypeError: the model takes no cache.
    """
    signature = inspect.signature(base.forward)
    if CACHE_NAME not in signature.parameters:
        raise TypeError(f"{base.__name__} takes no cache: its forward has no argument {CACHE_NAME}")

    # the signature is kept, because generate and trainers look at it
    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **named_cache(kwargs))
        uses_cache = given.arguments.get("use_cache")
        uses_cache = getattr(self.config, "use_cache", False) if uses_cache is None else uses_cache
        # a cache is for inference: training reads whole texts
        serves = not self.training and not torch.is_grad_enabled()
        if uses_cache and serves and given_cache(given.arguments) is None:
            given.arguments |= cache_argument(self.new_cache())
        return base.forward(*given.args, **given.kwargs)

    return forward


def either_name(generate):
    """A model's `generate` that takes a cache under either of its names."""

    @functools.wraps(generate)
    def generate_with(*args, **kwargs):
        return generate(*args, **named_cache(kwargs))

    return generate_with
