"""THE table: every method with the settings that tests use, and the tiny models they run on.

Adding a method means adding its rows here; the questions in `test_*.py` are then asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import hf_kvcache as kv
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.compat import cache_argument
from hf_kvcache.stores import PagedBuffer

# -- methods -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A cache with settings that make it work hard on about 80 tokens (or, `lossless`, have nothing to do)."""

    id: str
    make: Callable[[], kv.KVCache]
    lossless: bool = False
    evicts: bool = False

    def __str__(self):
        return self.id


class AnyBases:
    """Random projections for any of the tiny models, the same whatever was fed."""

    def __init__(self, rank=8, group_size_v=1, rope="pre"):
        self.rope = rope
        self._bases = {
            (i, side): random_basis(2, 16, group_size_v if side == "v" else 1, rank, seed=i)
            for i in range(4)
            for side in "kv"
        }

    def of(self, layer_idx, side):
        return self._bases[layer_idx, side]

    def check_model(self, module):
        pass


def random_basis(n_kv_heads, head_dim, group_size, rank, seed=0):
    """An orthogonal projection around a mean."""
    generator = torch.Generator().manual_seed(seed)
    n_groups, width = n_kv_heads // group_size, group_size * head_dim
    down = torch.linalg.qr(torch.randn(n_groups, width, width, generator=generator)).Q[..., :rank]
    up = down.mT.unflatten(2, (group_size, head_dim)).transpose(1, 2)
    return Basis(down.contiguous(), up.contiguous(), torch.randn(n_groups, width, generator=generator) / 4)


PRE, POST, JOINT, FULL = AnyBases(), AnyBases(rope="post"), AnyBases(16, group_size_v=2), AnyBases(16)

# small enough that tiny prompts are evicted and packed several times
KNOBS = dict(n_sink=2, n_recent=8, interval=4)

CASES = [
    # nothing to compress
    Case("dense", kv.KVCache, lossless=True),
    Case("dense-max_length256", lambda: kv.KVCache(max_length=256), lossless=True),
    Case("dense-codec-window8", lambda: kv.KVCache(codec=kv.Dense(), window=8), lossless=True),
    Case("quant4-window256", lambda: kv.QuantCache(4, window=256), lossless=True),
    Case("sparse0-window8", lambda: kv.SparseCache(0.0, window=8), lossless=True),
    Case("sparse0-index-window8", lambda: kv.SparseCache(0.0, window=8, layout="index"), lossless=True),
    Case("sparse0.7-window256", lambda: kv.SparseCache(window=256), lossless=True),
    Case("quant4-min_length256", lambda: kv.QuantCache(4, window=8, min_length=256), lossless=True),
    Case("lowrank1-window8", lambda: kv.LowRankCache(bases=FULL, window=8), lossless=True),
    Case("lowrank1-mix-window0", lambda: kv.LowRankCache(bases=FULL, mix=True, window=0, n_sink=0), lossless=True),
    Case("lowrank0.5-window256", lambda: kv.LowRankCache(0.5, window=256), lossless=True),
    Case("streaming-budget256", lambda: kv.EvictionCache("streaming", budget=256), lossless=True),
    Case("keydiff-ratio1", lambda: kv.EvictionCache("keydiff", ratio=1.0, n_sink=0, n_recent=0), lossless=True),
    # quantised
    Case("quant8-window8", lambda: kv.QuantCache(8, window=8)),
    Case("quant4-window8", lambda: kv.QuantCache(4, window=8)),
    Case("quant4-window0-sink4", lambda: kv.QuantCache(4, window=0, n_sink=4)),
    Case("quant4-rotate-window8", lambda: kv.QuantCache(4, window=8, rotate=True)),
    Case("quant4-edge1-window8", lambda: kv.QuantCache(4, window=8, edge_layers=1)),
    Case("quant4-max_length256", lambda: kv.QuantCache(4, window=8, max_length=256)),
    Case("quant3-window8", lambda: kv.QuantCache(3, window=8)),
    Case("quant2-window8", lambda: kv.QuantCache(2, window=8)),
    Case("quant8k4v-window8", lambda: kv.KVCache(codec=(kv.Quantize(8), kv.Quantize(4)), window=8)),
    # sparse
    Case("sparse0.5-window8", lambda: kv.SparseCache(0.5, window=8)),
    Case("sparse-keep5-index-window0", lambda: kv.SparseCache(keep_k=5, keep_v=3, layout="index", window=0, n_sink=0)),
    Case("sparse-balanced-max_length256", lambda: kv.SparseCache("balanced", window=8, max_length=256)),
    Case("sparse0.5-2:4-window8", lambda: kv.SparseCache(0.5, group_size=4, window=8)),
    Case("sparse0.5-output_aware-window8", lambda: kv.SparseCache(0.5, rule="output_aware", window=8)),
    Case("sparse0.5-think-window8", lambda: kv.SparseCache(0.5, rule="think", window=8)),
    Case("sparse0.5-quant8-window8", lambda: kv.SparseCache(0.5, bits=8, window=8)),
    Case("sparse0.5-index-quant4-window8", lambda: kv.SparseCache(0.5, bits=4, layout="index", window=8)),
    Case("sparsek-densev-window8", lambda: kv.KVCache(codec=(kv.Sparse(0.5), kv.Dense()), window=8)),
    Case("quant8k-sparsev-window8", lambda: kv.KVCache(codec=(kv.Quantize(8), kv.Sparse(0.5)), window=8)),
    Case("sparse-channel-v", lambda: kv.KVCache(codec=(kv.Sparse(0.5), kv.Sparse(0.5, axis="channel")), window=8)),
    # low rank
    Case("lowrank0.5-window8", lambda: kv.LowRankCache(bases=PRE, window=8)),
    Case("lowrank0.5-post-window8", lambda: kv.LowRankCache(bases=POST, rope="post", window=8)),
    Case("lowrank-joint-v-window0", lambda: kv.LowRankCache((8, 16), bases=JOINT, window=0, n_sink=0)),
    Case("lowrank0.5-quant4-window8", lambda: kv.LowRankCache(bases=PRE, bits=4, window=8)),
    Case(
        "lowrank0.5-post-quant2-max_length256",
        lambda: kv.LowRankCache(bases=POST, rope="post", bits=2, window=8, max_length=256),
    ),
    Case("lowrankk-densev-window8", lambda: kv.KVCache(codec=(kv.LowRank(bases=PRE), kv.Dense()), window=8)),
    Case("quant8k-lowrankv-window8", lambda: kv.KVCache(codec=(kv.Quantize(8), kv.LowRank(bases=PRE)), window=8)),
    Case("snapkv-budget256", lambda: kv.EvictionCache("snapkv", budget=256), lossless=True),
    Case("adakv-budget256-window4", lambda: kv.EvictionCache("adakv", budget=256, window=4), lossless=True),
    Case(
        "adakv-ratio1-rerotated",
        lambda: kv.EvictionCache("adakv", ratio=1.0, window=4, rerotate_keys=True),
        lossless=True,
    ),
    Case("triattention-budget256", lambda: kv.EvictionCache("triattention", budget=256), lossless=True),
    Case("chunkkv-ratio1", lambda: kv.EvictionCache("chunkkv", ratio=1.0), lossless=True),
    # evicting
    Case("streaming-budget24", lambda: kv.EvictionCache("streaming", budget=24, **KNOBS), evicts=True),
    Case("keydiff-budget24", lambda: kv.EvictionCache("keydiff", budget=24, **KNOBS), evicts=True),
    Case("keydiff-ratio0.5", lambda: kv.EvictionCache("keydiff", ratio=0.5, **KNOBS), evicts=True),
    Case("keydiff-prompt-only", lambda: kv.EvictionCache("keydiff", budget=24, decode=False, **KNOBS), evicts=True),
    Case("h2o-budget24", lambda: kv.EvictionCache("h2o", budget=24, **KNOBS), evicts=True),
    Case("snapkv-budget24", lambda: kv.EvictionCache("snapkv", budget=24, n_queries=8, **KNOBS), evicts=True),
    Case("expected-budget24", lambda: kv.EvictionCache("expected_attention", budget=24, **KNOBS), evicts=True),
    Case(
        "pyramidkv-budget24",
        lambda: kv.EvictionCache("pyramidkv", budget=24, beta=2, n_queries=4, **KNOBS),
        evicts=True,
    ),
    Case("triattention-budget24", lambda: kv.EvictionCache("triattention", budget=24, **KNOBS), evicts=True),
    Case(
        "chunkkv-budget24",
        lambda: kv.EvictionCache("chunkkv", budget=24, scorer="keydiff", chunk_size=5, **KNOBS),
        evicts=True,
    ),
    Case(
        "streaming-rerotated",
        lambda: kv.EvictionCache("streaming", budget=24, rerotate_keys=True, **KNOBS),
        evicts=True,
    ),
    Case("keydiff-merge", lambda: kv.EvictionCache("keydiff", budget=24, merge=True, **KNOBS), evicts=True),
    # layers with options of their own
    Case(
        "keydiff-layer1-quant4",
        lambda: kv.KVCache(
            kv.KeyDiff(ratio=0.5, **KNOBS),
            window=8,
            per_layer={1: {"ratio": 0.75, "window": 4, "codec": kv.Quantize(4, axis="token")}},
        ),
        evicts=True,
    ),
    Case(
        "quant2-layer1-sparse",
        lambda: kv.KVCache(codec=kv.Quantize(2), window=8, per_layer={1: {"codec": kv.Sparse(0.5), "n_sink": 4}}),
    ),
    # heads of different lengths
    Case("adakv-budget42", lambda: kv.EvictionCache("adakv", budget=42, scorer="keydiff", **KNOBS), evicts=True),
    Case(
        "adakv-ratio0.5-rerotated",
        lambda: kv.EvictionCache("adakv", ratio=0.5, rerotate_keys=True, **KNOBS),
        evicts=True,
    ),
    Case("duo", lambda: kv.EvictionCache("duo", gates=[[1, 0], [0, 1]], window=4, **KNOBS), evicts=True),
    Case(
        "adakv-quant8",
        lambda: kv.QuantCache(8, window=4, policy=kv.AdaKV(budget=42, scorer="keydiff", **KNOBS)),
        evicts=True,
    ),
    Case(
        "threshold-sparse0.5",
        lambda: kv.KVCache(kv.Threshold(scorer="h2o", share=0.7, **KNOBS), kv.Sparse(0.5), window=4),
        evicts=True,
    ),
    # both
    Case(
        "streaming-sparse0.5",
        lambda: kv.SparseCache(0.5, window=4, policy=kv.Streaming(budget=44, **KNOBS)),
        evicts=True,
    ),
    Case(
        "keydiff-sparse-quant8",
        lambda: kv.SparseCache(0.5, bits=8, window=4, policy=kv.KeyDiff(budget=44, **KNOBS)),
        evicts=True,
    ),
    Case(
        "streaming-lowrank0.5",
        lambda: kv.LowRankCache(bases=PRE, window=4, n_sink=0, policy=kv.Streaming(budget=44, **KNOBS)),
        evicts=True,
    ),
    Case(
        "keydiff-lowrank0.5-quant8",
        lambda: kv.LowRankCache(bases=PRE, bits=8, window=4, n_sink=0, policy=kv.KeyDiff(budget=44, **KNOBS)),
        evicts=True,
    ),
    Case("keydiff-quant8", lambda: kv.QuantCache(8, window=4, policy=kv.KeyDiff(budget=44, **KNOBS)), evicts=True),
]


def unequal_layers():
    """A budget and a policy per layer, so that layers and heads differ in which and how many rows they keep."""
    cache = kv.KVCache()
    cache.layers = [
        kv.KVLayer(0, policy=kv.KeyDiff(budget=14, n_sink=1, n_recent=4, interval=2)),
        kv.KVLayer(1, policy=kv.Streaming(budget=22, n_sink=2, n_recent=4, interval=3)),
    ]
    return cache


LOSSLESS = [case for case in CASES if case.lossless]
LOSSY = [case for case in CASES if not case.lossless]
EVICTING = [case for case in CASES if case.evicts]
BY_ID = {case.id: case for case in CASES}


def new_policies(covered):
    """Caches by name: dense rows under every kind of policy that evicts and is none of those `covered`."""
    kinds = {type(policy) for policy in covered}
    made = {case.id: (case.make, case.make()) for case in EVICTING}
    plain = {name: make for name, (make, cache) in made.items() if not (cache.codec or cache.policy.merges_evicted)}
    return {name: make for name, make in plain.items() if type(made[name][1].policy) not in kinds}


# -- models --------------------------------------------------------------------------------------------------------

VOCAB = 128
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    head_dim=16,
)
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 64}
HYBRID = dict(num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)

ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window8": lambda: MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "phi3": lambda: Phi3Config(**WITHOUT_HEAD_DIM),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES | HYBRID, query_pre_attn_scalar=16, attn_logit_softcapping=4.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES | HYBRID, query_pre_attn_scalar=16),
}
HYBRIDS = ["mistral-window8", "gemma2", "gemma3"]
NAMED = "hf_kvcache"


def stock_implementation(arch: str) -> str:
    """What transformers would load the model with: Gemma-2 asks for eager because of its softcap."""
    return "eager" if arch == "gemma2" else "sdpa"


@cache
def tiny_model(arch="llama", implementation=NAMED, dtype=torch.float32, seed=0):
    """A random model, never to be changed by a test: it is shared."""
    return new_model(ARCHITECTURES[arch](), implementation, dtype, seed)


def new_model(config, implementation=NAMED, dtype=torch.float32, seed=0):
    """A random model whose attention matters: with the usual initialisation every score is close to zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(6)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def prompt(batch=1, length=60, seed=1):
    """Random token ids `[batch, length]`."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, seed=1):
    """Left-padded ids and mask for rows of these lengths, and the rows alone."""
    width = max(lengths)
    ids = prompt(len(lengths), width, seed)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        ids[row, : width - n], mask[row, : width - n] = 0, 0
    return ids, mask, [ids[row : row + 1, width - n :] for row, n in enumerate(lengths)]


def generate(model, ids, cache=None, **options):
    """Greedy unless told; returns transformers' output with `.sequences` and `.logits`."""
    options = dict(max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **cache_argument(cache), **options)


def replay(model, cache, ids, sizes, mask=None):
    """Feed `ids` `[B, T]` in pieces of `sizes` tokens; returns the logits of every token `[B, T, vocabulary]`."""
    assert sum(sizes) == ids.shape[1]
    logits, start = [], 0
    for size in sizes:
        stop, options = start + size, {}
        if mask is not None:
            positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            options = dict(attention_mask=mask[:, :stop], position_ids=positions)
        logits.append(model(ids[:, start:stop], **cache_argument(cache), use_cache=True, **options).logits)
        start = stop
    return torch.cat(logits, 1)


def recompute(model, use_reentrant=False):
    """Let a model run its layers again in the backward pass; 5.24 has renamed how."""
    turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    turn_on({"use_reentrant": use_reentrant})


def splits(total, size):
    """`total` in pieces of `size`, the last one shorter."""
    return [size] * (total // size) + ([total % size] if total % size else [])


def state(cache):
    """Every byte in use of a cache, batch first: `{(layer, buffer, name): tensor}`."""
    return {
        (i, which, name): tensor
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, kv.KVLayer)
        for which, buffer in layer.store.buffers().items()
        for name, tensor in _by_row(buffer).items()
    }


def _by_row(buffer):
    if not isinstance(buffer, PagedBuffer):
        return buffer.views()
    held = {name: buffer.read(name) for name in buffer.tensors}
    return held | ({"lengths": buffer.lengths} if held else {})


def assert_same_state(cache, other):
    """Two caches hold the same bytes."""
    ours, theirs = state(cache), state(other)
    assert ours.keys() == theirs.keys()
    for where, tensor in ours.items():
        assert torch.equal(tensor, theirs[where]), f"{where} differs"
    assert cache.get_seq_length() == other.get_seq_length()


def assert_close(name, ours, reference, tolerance):
    """The largest difference stays below `tolerance`; says by how much it does not."""
    worst = (ours.float() - reference.float()).abs().max().item()
    assert worst <= tolerance, f"{name}: {worst:.2e} > {tolerance:.0e}"
