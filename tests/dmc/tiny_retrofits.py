"""Tiny retrofitted models, and what DMC and DMS do to one attention module, as it is written on paper."""

from contextlib import contextmanager

import torch
from cases import SIZES, VOCAB, new_model, prompt
from transformers import LlamaConfig

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import Settings, retrofit, retrofits

CACHES = {"dmc": kv.DMCCache, "dms": kv.DMSCache}


def settings(method="dmc", **knobs):
    """With logits that go both ways on a random model."""
    return Settings(method=method, **dict(offset=0.5, scale=5.0 if method == "dmc" else 50.0) | knobs)


def llama(n_layers=1, G=2, dtype=torch.float64, seed=0):
    """Not retrofitted yet; its embeddings share a direction, so that decisions can lean to a side."""
    sizes = SIZES | dict(num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4 // G, head_dim=8)
    model = new_model(LlamaConfig(**sizes), dtype=dtype, seed=seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
    return model


def retrofitted(method="dmc", n_layers=1, G=2, dtype=torch.float64, bias=None, seed=0, model=None, **knobs):
    """A random model that decides at random: `bias` per KV head is how much it likes to merge or drop."""
    model = llama(n_layers, G, dtype, seed) if model is None else model
    chosen = settings(method, **knobs)
    retrofit(model, chosen)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for child in retrofits(model).values():
            for rows, std in ((child.decision, 0.15), (child.importance, 0.3)):
                if rows is not None:
                    rows.copy_(torch.randn(rows.shape, generator=generator) * std)
        if bias is not None:
            bias_decisions(model, chosen, bias)
    return model.requires_grad_(False)


def bias_decisions(model, chosen, bias):
    """Add to the logits of every KV head by way of the channel that all embeddings share."""
    for i, child in retrofits(model).items():
        attention = model.model.layers[i].self_attn
        H, D, G = model.config.num_key_value_heads, attention.head_dim, attention.num_key_value_groups
        by = torch.tensor(bias).expand(H)
        if child.decision is not None:
            child.decision[:, 0] += by
        elif chosen.merges:
            attention.k_proj.weight.view(H, D, -1)[:, chosen.neuron, 0] += by
        else:
            attention.q_proj.weight.view(H, G, D, -1)[:, 0, chosen.neuron, 0] += by


def batch(lengths, seed=1):
    """Left-padded ids, mask and positions for rows of these lengths."""
    width = max(lengths)
    ids = prompt(len(lengths), width, seed)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        ids[row, : width - n], mask[row, : width - n] = 0, 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def whole(model, ids, mask, positions):
    """Logits without a cache."""
    return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def lengths(cache):
    """Rows of every head, `[L, B, Hkv]`."""
    return torch.stack([layer.store.packed.lengths for layer in cache.layers])


@contextmanager
def recorded(model):
    """Inputs and outputs `[B, S, hidden]` of the attention modules, call after call, by layer."""
    seen = {i: ([], []) for i in range(model.config.num_hidden_layers)}

    def note(module, args, kwargs, output):
        inputs, outputs = seen[module.layer_idx]
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output[0])

    handles = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- on paper ------------------------------------------------------------------------------------------------------


def rope(x, position, base=10000.0):
    """One vector per head `[n, D]`, rotated by angles in float32, which is how models have them."""
    half = x.shape[-1] // 2
    angle = float(position) * (1 / base ** (torch.arange(half).float() / half))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def on_paper(attention, hidden, mask, positions):
    """Token after token, head after head: what the module gives `[B, T, hidden]`, and the rows that it ends with.

    Args:
        attention: a retrofitted Llama attention module.
        hidden: its input, `[B, T, hidden]`.
        mask, positions: `[B, T]`.
    """
    chosen, child = attention.kv_dmc.settings, attention.kv_dmc
    B, T, _ = hidden.shape
    D, G = attention.head_dim, attention.num_key_value_groups
    H, j = attention.config.num_key_value_heads, chosen.neuron
    out, n_rows = torch.zeros(B, T, H * G, D, dtype=hidden.dtype), torch.zeros(B, H, dtype=torch.int32)
    for b in range(B):
        heads = [[] for _ in range(H)]
        for t in range(T):
            if not mask[b, t]:
                continue
            x = hidden[b, t]
            q = (attention.q_proj.weight @ x).view(H, G, D).clone()
            k, v = ((p.weight @ x).view(H, D).clone() for p in (attention.k_proj, attention.v_proj))
            logits, weights = _decisions(chosen, child, x, q, k)
            if chosen.decision != "linear":
                (q if chosen.merges else q[:, :1])[..., j] = 0
                if chosen.merges:
                    k[:, j] = 0
            at = int(positions[b, t])
            for h in range(H):
                step = _merge if chosen.merges else _drop
                rows = step(chosen, heads[h], logits[h] > 0, weights[h], k[h], v[h], at)
                n_rows[b, h] = len(rows)
                keys, values = (torch.stack(side) for side in zip(*rows))
                turned = rope(q[h], at)
                if chosen.zero_after_rope and chosen.decision != "linear":
                    turned[: G if chosen.merges else 1, j] = 0
                share = (turned @ keys.T / D**0.5).softmax(-1)
                out[b, t, h * G : (h + 1) * G] = share @ values
    return out.flatten(2) @ attention.o_proj.weight.T, n_rows


def _decisions(chosen, child, x, q, k):
    """Logits and weights of one token, `[H]`."""
    if chosen.decision != "borrowed":
        raw = child.decision @ x
    else:
        raw = k[:, chosen.neuron] if chosen.merges else q[:, 0, chosen.neuron]
    logits = chosen.scale * raw - chosen.offset
    if chosen.per == "layer":
        logits = logits.mean().expand_as(logits)
    if not chosen.merges:
        return logits, [None] * len(logits)
    raw = q[..., chosen.neuron].mean(1) if child.importance is None else child.importance @ x
    return logits, 1 / (1 + torch.exp(-(raw + chosen.offset))) + 2**-7


def _merge(chosen, head, goes, weight, k, v, at):
    """A head is a list of `(members of a segment, their row)`: the mean, its key rotated as the newest member."""
    member = weight, k, v
    segment = [*head.pop()[0], member] if goes and head else [member]
    newest = segment[-chosen.window :] if chosen.window else segment
    z = sum(m[0] for m in newest)
    mean_k, mean_v = (sum(m[0] * m[side] for m in newest) / z for side in (1, 2))
    head.append((segment, (rope(mean_k, at), mean_v)))
    return [row for _, row in head]


def _drop(chosen, head, goes, weight, k, v, at):
    """A head is a list of `[key, value, position, condemned]`."""
    if goes and head:
        head[-1][3] = True
    head.append([rope(k, at), v, at, False])
    return [(key, value) for key, value, then, condemned in head if not condemned or at - then <= chosen.window]


def feed(model, cache, ids, mask, positions, sizes):
    """Logits `[B, T, V]` of a text in pieces."""
    assert sum(sizes) == ids.shape[1]
    logits, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        start += size
        options = dict(attention_mask=mask[:, :start], position_ids=positions[:, piece], **cache_argument(cache))
        logits.append(model(ids[:, piece], **options).logits)
    return torch.cat(logits, 1)


__all__ = ["CACHES", "VOCAB"]
