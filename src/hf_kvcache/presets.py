"""The named caches: a policy and a codec under the name people look for."""

from __future__ import annotations

from hf_kvcache import former_names, registry
from hf_kvcache.adapters.bases import Bases
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import Dense, LowRank, Quantize, Sparse
from hf_kvcache.dmc.policies import DMC, DMS
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.locret import Locret
from hf_kvcache.policies.merge import Merge


class DenseCache(KVCache):
    """Lossless: `KVCache()` under the name that the command line uses."""


class QuantCache(KVCache):
    """Keys per channel in blocks of 32 tokens, values per token, recent window dense (KIVI, arXiv 2402.02750).

    Args:
        bits: 8, 4, 3 or 2.
        window: newest tokens in full precision; up to 31 more wait there for their block.
        rotate: mix channels by a Hadamard matrix before rounding (QuaRot, arXiv 2404.00456).
        key_axis: "channel", or "token" to make rows independent (needed under an eviction policy; ruins models with
            large key biases).
        group_size: channels per value scale; None picks 64, or 32 at 2 bits.
        edge_layers: this many first and last layers get `edge_bits`.
        edge_bits: bits of those layers.
        **kwargs: `policy`, `n_sink`, `min_length`, `max_length`, `config`, `offloading` of `KVCache`.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        window: int = 64,
        rotate: bool = False,
        key_axis: str | None = None,
        group_size: int | None = None,
        edge_layers: int = 0,
        edge_bits: int = 8,
        **kwargs,
    ):
        if key_axis is None:
            key_axis = "channel" if kwargs.get("policy") is None else "token"
        pair = self._codecs(bits, key_axis, group_size, rotate)
        edge = self._codecs(edge_bits, key_axis, group_size, rotate) if edge_layers else None
        super().__init__(codec=pair, edge_codec=edge, edge_layers=edge_layers, window=window, **kwargs)

    @staticmethod
    def _codecs(bits, key_axis, group_size, rotate):
        return (
            Quantize(bits, axis=key_axis, group_size=group_size if key_axis == "token" else None, rotate=rotate),
            Quantize(bits, axis="token", group_size=group_size, rotate=rotate),
        )


class SparseCache(KVCache):
    """The largest channels of every token, in rows of a fixed size (Mustafar, arXiv 2505.22913).

    Prefill output is exact; tokens are pruned in blocks as they leave the window.

    Args:
        sparsity: share of the channels to drop; a pair `(keys, values)`, or "balanced" for (0.5, 0.7): keys are the
            more fragile.
        keep_k, keep_v: channels to keep, exactly, instead of a share.
        bits: also quantise what is kept, per token, to 8, 4, 3 or 2 bits.
        layout: "bitmap" (least memory) or "index".
        rule: which channels stay: "magnitude", "output_aware", or the baseline "think"; see `Sparse`.
        group_size: keep an equal share of every group of this many channels; 4 with sparsity 0.5 is the 2:4 pattern.
        window: newest tokens that stay dense; up to 31 more wait there for their block.
        n_sink: oldest tokens that stay dense (of a left-padded row these are pads, and its first tokens are pruned).
        **kwargs: `policy`, `edge_layers`, `min_length`, `max_length`, `config`, `offloading` of `KVCache`.
    """

    BALANCED = (0.5, 0.7)

    def __init__(
        self,
        sparsity: float | tuple[float, float] | str = 0.7,
        *,
        keep_k: int | None = None,
        keep_v: int | None = None,
        bits: int | None = None,
        layout: str = "bitmap",
        rule: str = "magnitude",
        group_size: int | None = None,
        window: int = 32,
        n_sink: int = 4,
        **kwargs,
    ):
        if isinstance(sparsity, str):
            if sparsity != "balanced":
                raise ValueError(f"sparsity={sparsity!r} is neither a share, a pair of shares, nor 'balanced'")
            sparsity = self.BALANCED
        shares = tuple(sparsity) if isinstance(sparsity, (tuple, list)) else (sparsity, sparsity)
        if len(shares) != 2:
            raise ValueError(f"sparsity={sparsity!r} is neither a share, a pair of shares, nor 'balanced'")
        integers = Dense() if bits is None else Quantize(bits, axis="token")
        codec = tuple(
            Sparse(None if keep is not None else share, keep, layout, rule, group_size=group_size) >> integers
            for share, keep in zip(shares, (keep_k, keep_v), strict=True)
        )
        super().__init__(codec=codec, window=window, n_sink=n_sink, **kwargs)


class LowRankCache(KVCache):
    """Low-rank latents of keys and values, expanded inside attention (Palu, arXiv 2407.21118).

    The projection comes from `adapter` or `bases`, else from the adapter that the model carries, else it is fitted to
    the prompt and held by the cache (said once). Prefill output is exact; tokens are projected as they leave the
    window.

    Args:
        rank: latent channels per group of heads, or a share of the group's channels; a pair `(keys, values)`. None
            means what the basis was calibrated for, half without one.
        bits: also quantise the latents, per token, to 8, 4, 3 or 2 bits, their energy shared out by a rotation that
            costs nothing (it is folded into the projection).
        rope: "pre" projects keys before RoPE and rebuilds them inside attention, "post" projects them after it and
            projects the query instead: faster, but it needs more rank. None means as calibrated, "pre" otherwise.
        group_size: KV heads that share latents: 1, 4 and "all" are Palu's M-LRD, G-LRD and J-LRD; a pair `(keys,
            values)`. None means that of the basis, 1 without one.
        adapter: calibrated bases, a folder or a Hub id (`hf-kvcache calibrate lowrank` writes one).
        bases: the same, loaded.
        exact_prefill: False lets the prompt, too, attend to projected rows, as the published evaluations do.
        mix: share out the energy of the latents (None: where they are quantised).
        centre: subtract the mean row, where the projection is fitted to the prompt.
        share_layers: this many neighbouring layers keep one row of latents per token between them (xKV, Chang et al.
            2025); their projection is always fitted to the prompt, and `rank` is out of the channels of all of them.
        window: newest tokens that stay dense; up to 31 more wait there for their block.
        n_sink: oldest tokens that stay dense (of a left-padded row these are pads).
        **kwargs: `policy`, `edge_layers`, `min_length`, `max_length`, `config`, `offloading` of `KVCache`.
    """

    def __init__(
        self,
        rank: float | int | tuple | None = None,
        *,
        bits: int | None = None,
        rope: str | None = None,
        group_size: int | str | tuple | None = None,
        adapter=None,
        bases=None,
        mix: bool | None = None,
        centre: bool = True,
        share_layers: int = 1,
        window: int = 64,
        n_sink: int = 4,
        **kwargs,
    ):
        if adapter is not None:
            if bases is not None:
                raise ValueError("adapter= and bases= are two ways to say the same; give one")
            bases = Bases.load(adapter)
        integers = Dense() if bits is None else Quantize(bits, axis="token")
        codec = tuple(
            LowRank(r, s, rope, mix, centre, share_layers, bases) >> integers
            for r, s in zip(_pair(rank, "rank"), _pair(group_size, "group_size"), strict=True)
        )
        super().__init__(codec=codec, window=window, n_sink=n_sink, **kwargs)

    @classmethod
    def from_adapter(cls, path, **kwargs) -> LowRankCache:
        """A cache with the bases of an adapter: a folder or a Hub id. The model need not carry it.

        Raises:
            AdapterError: the files are missing, damaged, or of another method.
        """
        return cls(adapter=path, **kwargs)


def _pair(value, name: str) -> tuple:
    """One setting for keys and values, or a pair."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}={value!r} is neither one setting nor a pair (keys, values)")
    return tuple(value)


class EvictionCache(KVCache):
    """Keep the tokens that a policy chooses, within a budget.

    Args:
        policy: name of an eviction method (`hf-kvcache methods`), or a `Policy`.
        codec: also encode what stays, with a row-granular codec.
        merge: let evicted rows leave their values to the kept rows most like them (see `Merge`).
        rerotate_keys: close the gaps in the positions (see `KVCache`).
        window: newest rows that stay dense under a codec, or out of the pages of a policy with a length per head;
            None means 64 under a codec, `n_recent` of the policy otherwise.
        edge_layers, edge_codec, max_length, config, offloading: see `KVCache`.
        **knobs: arguments of the policy: `budget=1024` or `ratio=0.25`, `n_sink`, `n_recent`, `decode`, ...
    """

    @former_names.argument("compact", "rerotate_keys")
    def __init__(
        self,
        policy: str | Policy,
        *,
        codec=None,
        merge: bool = False,
        rerotate_keys: bool = False,
        window: int | None = None,
        edge_layers: int = 0,
        edge_codec=None,
        max_length: int | None = None,
        config=None,
        offloading: bool = False,
        **knobs,
    ):
        if isinstance(policy, str):
            kind = registry.load(registry.method(policy).factory)
            if not issubclass(kind, Policy):
                raise ValueError(f"{policy!r} is not an eviction method")
            policy = kind(**knobs)
        elif knobs:
            raise TypeError(f"{', '.join(knobs)}: give the arguments of a policy to the policy itself")
        if merge:
            policy = Merge.over(policy)
        super().__init__(
            policy,
            codec,
            window=_window(window, codec, policy),
            rerotate_keys=rerotate_keys,
            edge_layers=edge_layers,
            edge_codec=edge_codec,
            max_length=max_length,
            config=config,
            offloading=offloading,
        )


def _window(window: int | None, codec, policy: Policy) -> int:
    if window is not None:
        return window
    return 64 if codec is not None else min(policy.n_recent, 64)


class LocretCache(KVCache):
    """Keep what the retaining heads of the model's adapter score highest (Locret, arXiv 2410.01805).

    Prompts are evicted from chunk by chunk: `hf_kvcache.prefill(model, ids, cache)` feeds them in chunks of `chunk`, as
    `generate(prefill_chunk_size=...)` does. Memory is then bounded by budget and chunk, whatever the prompt.

    Args:
        budget, ratio: rows to keep per head, as a count or as a share of the tokens seen.
        chunk: tokens of a prompt that `prefill` feeds at a time.
        stabilizers: newest rows that stay between chunks; None picks 2,500 or a quarter of the budget, what is less.
        local: newest rows that stay when the prompt is complete.
        n_sink: oldest rows that always stay (0 in the paper).
        decode: whether to evict while decoding, too.
        interval: tokens by which a decoding layer may overshoot its budget.
        codec, window, rerotate_keys, edge_layers, edge_codec, max_length, config, offloading: see `KVCache`.
    """

    def __init__(
        self,
        budget: int | None = None,
        *,
        ratio: float | None = None,
        chunk: int = 1024,
        stabilizers: int | None = None,
        local: int = 100,
        n_sink: int = 4,
        decode: bool = False,
        interval: int = 32,
        codec=None,
        window: int = 64,
        **kwargs,
    ):
        if chunk < 1:
            raise ValueError(f"LocretCache: chunk={chunk} must be at least 1")
        self.chunk = chunk
        sizes = dict(budget=budget, ratio=ratio, n_sink=n_sink, n_recent=local)
        policy = Locret(**sizes, stabilizers=stabilizers, decode=decode, interval=interval)
        super().__init__(policy, codec, window=window, **kwargs)


class DMCCache(KVCache):
    """The cache of a model that was retrofitted to merge tokens (DMC, arXiv 2403.09636).

    What is kept is the model's decision, per head; there is no budget. It needs a model from `trainers/train_dmc.py`.

    Args:
        codec: row-granular codec, such as `Quantize(8, axis="token")`, that rows are encoded with as they are written;
            None keeps them dense.
        config, offloading: see `KVCache`.
    """

    def __init__(self, codec=None, *, config=None, offloading: bool = False):
        super().__init__(DMC(), codec, window=0, config=config, offloading=offloading)


class DMSCache(KVCache):
    """The cache of a model that was retrofitted to drop tokens (DMS, arXiv 2506.05345).

    A token that the model decides against stays for the window that it was trained with; then its row is used again.

    Args:
        codec, config, offloading: see `DMCCache`.
    """

    def __init__(self, codec=None, *, config=None, offloading: bool = False):
        super().__init__(DMS(), codec, window=0, config=config, offloading=offloading)
