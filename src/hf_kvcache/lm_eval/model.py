"""The harness' model of transformers, with a cache of this package in it."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax
from tqdm import tqdm

from hf_kvcache.commands.common import ATTENTION, default_device
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.running import Settings
from hf_kvcache.eval.specs import SpecError, parse
from hf_kvcache.lm_eval.passages import answer, text
from hf_kvcache.lm_eval.scoring import Scorer
from hf_kvcache.long_prompts import prefill, reads_twice

OURS = ("cache", "adapter", "attn")
THEIRS = tuple(name for name in signature(HFLM.__init__).parameters if name not in ("self", "kwargs"))


class ArgumentError(ValueError):
    """An argument that does not exist, or with which the model could not do what it is asked for."""


class KVCacheLM(HFLM):
    """A model whose answers come through a compressed cache.

    Generation gives `generate` a new cache for every batch. A log-likelihood is that of the continuation, token by
    token, behind a cache that has read and compressed the context (`passages`, `scoring`).

    Args:
        pretrained: Hub id, local folder, a name of `hf-kvcache models list`, or a model.
        cache: as in `hf-kvcache compare`: "quant:bits=4".
        adapter: retaining heads, low-rank bases or a retrofit to attach: folder or Hub id.
        attn: attention under our caches: "hf_kvcache", "sdpa" or "eager".
        kwargs: those of the harness' `hf` that are named in its signature.

    Raises:
        ArgumentError: an argument is unknown, or does not go with a cache.
    """

    def __init__(
        self, pretrained=None, cache: str | None = None, adapter: str | None = None, attn: str = "hf_kvcache", **kwargs
    ):
        _check(pretrained, cache, attn, kwargs)
        try:
            self._spec = parse(cache)
            self._spec.check()
        except SpecError as error:
            raise ArgumentError(f"cache: {error}") from error
        # the harness' default is "cuda", whether there is one or not
        kwargs.setdefault("device", str(default_device()))
        super().__init__(_found(pretrained), **kwargs)
        _check_backend(self.backend)
        if adapter is not None:
            _attach(self.model, adapter)
        prepare(self.model, self._spec, Settings(attention=attn))
        self._n_bytes = self._n_tokens = 0

    def _get_config(self, pretrained: str, *, revision: str = "main", subfolder: str = "", **kwargs) -> None:
        from hf_kvcache.dmc.files import make_known

        make_known(pretrained, revision=revision, subfolder=subfolder)
        super()._get_config(pretrained, revision=revision, subfolder=subfolder, **kwargs)

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs) -> torch.Tensor:
        cache = self._spec.build(self.model.config)
        if reads_twice(cache) and context.shape[1] > 1:
            prefill(self.model, context, cache, attention_mask=generation_kwargs.get("attention_mask"))
        said = super()._model_generate(context, max_length, stop, **cache_argument(cache), **generation_kwargs)
        self._measured(cache_nbytes(cache), cache.get_seq_length() * len(context))
        return said

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        passages = []
        for strings, context, continuation in requests:
            # windows of a text come without strings
            passage = (text if strings is None else answer)(context, continuation, self.max_length)
            passages.append(passage)
        # neither packed rows nor states of linear attention can be repeated in transformers' own caches
        n_rows = 1 if self._spec.is_peer else self.batch_size
        scorer = Scorer(self.model, self._new_cache, n_rows, self._log_softmax, self._measured)
        found: list = [None] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar, self._autocast():
            for i, total, is_greedy in scorer.score(passages):
                found[i] = total, is_greedy
                if (strings := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, found[i])
                bar.update()
        return found

    def get_model_info(self) -> dict:
        """What the harness writes of the model, and bytes of the cache per token read: a mean over all texts."""
        held = self._n_bytes / self._n_tokens if self._n_tokens else None
        return super().get_model_info() | {"kv_cache": self._spec.text, "kv_cache_bytes_per_token": held}

    def _new_cache(self):
        return self._spec.build(self.model.config)

    def _log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return log_softmax(logits, dim=-1, dtype=self.softmax_dtype)

    def _autocast(self):
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _measured(self, n_bytes: int, n_tokens: int) -> None:
        self._n_bytes += n_bytes
        self._n_tokens += n_tokens


def _found(pretrained):
    """A model, or what `from_pretrained` takes for its name."""
    from hf_kvcache.models import resolve

    try:
        return resolve(pretrained) if isinstance(pretrained, str) else pretrained
    except FileNotFoundError as error:
        raise ArgumentError(f"pretrained: {error}") from error


def _attach(model, adapter) -> None:
    from hf_kvcache.adapters import attach

    try:
        attach(model, str(adapter))
    except (ImportError, ValueError) as error:
        raise ArgumentError(f"adapter: {error}") from error


def _check_backend(backend: str) -> None:
    if backend not in ("default", "causal"):
        raise ArgumentError(f"backend={backend}: caches of this package are for causal language models")


def _check(pretrained, cache, attn, kwargs: dict) -> None:
    """Refuse what the harness would hand on to transformers without a word, or what has no meaning here."""
    for name in kwargs:
        if name not in THEIRS:
            known = [*OURS, *THEIRS]
            near = get_close_matches(name, known, 1)
            hint = f"is {near[0]} meant?" if near else f"there are {', '.join(known)}."
            raise ArgumentError(
                f"hf-kvcache has no argument {name!r}: {hint} A cache with several arguments of its own is given as "
                'JSON: --model_args \'{"pretrained": "...", "cache": "quant:bits=4,window=32"}\''
            )
    if pretrained is None or cache is None:
        raise ArgumentError("hf-kvcache needs a model and a cache: --model_args pretrained=...,cache=quant:bits=4")
    _check_backend(kwargs.get("backend", "default"))
    if attn not in ATTENTION:
        raise ArgumentError(f"attn={attn} is none of {', '.join(ATTENTION)}")
    if str(kwargs.get("batch_size", 1)).startswith("auto"):
        raise ArgumentError("batch_size=auto is measured without a cache; give a number")
    if kwargs.get("logits_cache") is False:
        raise ArgumentError("logits_cache=False: a context is always read once for all of its continuations")
