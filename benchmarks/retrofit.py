"""What retrofits buy: models that merge or drop tokens beside policies that evict, at the same bytes.

    python benchmarks/run.py retrofit --retrofits FOLDER

`FOLDER` holds one folder per model as `trainers/train_dmc.py` writes them: `control` (the same steps without
compression), any retrofits, and any models with fewer KV heads. Policies act on the control run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import recall
from hf_kvcache.eval import retrieval
from hf_kvcache.models import embedded_prose

POLICIES = {
    "H2O": kv.H2O,
    "TOVA": kv.TOVA,
    "sliding window": kv.Streaming,
    "window, merging": lambda ratio: kv.Merge.over(kv.Streaming(ratio=ratio)),
    "KeyDiff, merging": lambda ratio: kv.Merge.over(kv.KeyDiff(ratio=ratio)),
}
CONTROL = "control"
N_NEXT, STEP, PROMPTS, QUESTIONS, WINDOWS = 256, 8, 4, 32, 4
LENGTHS = (1024, 4096, 16384)


@torch.no_grad()
def retrofit(options) -> list[dict]:
    """Perplexity and retrieval of retrofits, and of the control run under policies at each retrofit's bytes."""
    folder = Path(options.retrofits or "retrofits")
    if not (folder / CONTROL / "config.json").is_file():
        raise SystemExit(f"{folder} holds no {CONTROL} run; trainers/README.md says how to make the models")
    tokenizer = AutoTokenizer.from_pretrained(folder / CONTROL)
    text = Path(options.text).read_text(encoding="utf-8") if options.text else embedded_prose().read_text("utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    tasks = _tasks(options, tokenizer, ids)
    base = _load(kv.embedded_model())
    rows = [_row("before training", base, DynamicCache, tasks)]
    control = _load(folder / CONTROL)
    rows.append(_row("control run", control, DynamicCache, tasks))
    for size in (2, 4):
        pooled = recall.pool(_load(folder / CONTROL), size)
        rows.append(_row(f"means of {size} neighbours", pooled, kv.DMCCache, tasks))
    for path in sorted(path for path in folder.iterdir() if (path / "config.json").is_file() and path.name != CONTROL):
        model = _load(path)
        rows.append(_row(path.name, model, _cache_of(model), tasks))
        kept = rows[-1]["bytes"]
        if kept < 1:
            same = {name: partial(_evicting, make, kept) for name, make in POLICIES.items()}
            rows += [_row(f"{name} at the bytes of {path.name}", control, make, tasks) for name, make in same.items()]
    return rows


def _load(path):
    attn = {"attn_implementation": "hf_kvcache", "dtype": torch.float32}
    try:
        return dmc.load(path, **attn).eval()
    except ValueError:
        return AutoModelForCausalLM.from_pretrained(path, **attn).eval()


def _cache_of(model):
    settings = [child.settings for child in dmc.retrofits(model).values()]
    if not settings:
        return DynamicCache
    return kv.DMCCache if settings[0].merges else kv.DMSCache


def _evicting(make, kept):
    # no rows wait for a codec: what is kept is what is counted
    return kv.KVCache(make(ratio=kept), window=0)


def _tasks(options, tokenizer, ids) -> dict:
    n_context = options.context - N_NEXT
    starts = torch.linspace(0, len(ids) - options.context, WINDOWS).long()
    windows = torch.stack([ids[start : start + options.context] for start in starts])
    windows[:, 0] = tokenizer.bos_token_id
    ledger = retrieval.Ledger.from_tokenizer(tokenizer)
    sizes = {"n_prompts": PROMPTS, "n_questions": QUESTIONS, "n_entries": QUESTIONS, "seed": 1}
    prompts = retrieval.build_prompts(ledger, ids.numpy(), options.context // 2, **sizes)
    return {"windows": windows, "n_context": n_context, "prompts": prompts}


def _row(name, model, make, tasks) -> dict:
    cache = make()
    nll = _continue(model, cache, tasks["windows"], tasks["n_context"])
    dense = _dense_bytes(model, tasks["windows"])
    nbytes = _nbytes(cache)
    return {
        "model and cache": name,
        "bytes": nbytes / dense,
        "ratio": dense / nbytes,
        "perplexity": float(torch.exp(nll)),
        "retrieval": retrieval.exact_match(model, tasks["prompts"], make),
        "tokens": tasks["windows"].shape[1] - 1,
        "rows per head": _rows(cache),
    }


def _continue(model, cache, windows, n_context) -> torch.Tensor:
    """Mean loss of what follows a context, through the cache; nothing is predicted by the prefill itself."""
    model(windows[:, :n_context], **cache_argument(cache), logits_to_keep=1)
    losses = []
    for start in range(n_context, windows.shape[1] - 1, STEP):
        fed = windows[:, start : min(start + STEP, windows.shape[1] - 1)]
        logits = model(fed, **cache_argument(cache)).logits.float()
        target = windows[:, start + 1 : start + 1 + fed.shape[1]]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
    return torch.cat(losses).mean()


def _dense_bytes(model, windows) -> int:
    """Of the embedded model's cache for the tokens that a cache has seen: fewer KV heads count as compression."""
    config = AutoModelForCausalLM.from_pretrained(kv.embedded_model()).config
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
    return windows.shape[0] * (windows.shape[1] - 1) * row


def _nbytes(cache) -> int:
    if isinstance(cache, kv.KVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _rows(cache) -> list | None:
    """Rows kept, by layer and head, as a mean over the batch: of caches whose heads differ."""
    if not isinstance(cache, kv.KVCache) or not isinstance(cache.policy, (kv.DMC, kv.DMS)):
        return None
    return [layer.store.packed.lengths.float().mean(0).round().int().tolist() for layer in cache.layers]


@torch.no_grad()
def realised(options) -> list[dict]:
    """What the running cache of every retrofit holds after 1K, 4K and 16K tokens, all metadata included."""
    folder = Path(options.retrofits or "retrofits")
    rows = []
    for path in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        model = _load(path)
        make = _cache_of(model)
        if make is DynamicCache:
            continue
        tokenizer = AutoTokenizer.from_pretrained(path)
        text = Path(options.text).read_text("utf-8") if options.text else embedded_prose().read_text("utf-8")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = ids.repeat(-(-max(LENGTHS) // len(ids)))
        for n in LENGTHS:
            cache = make()
            for start in range(0, n, 1024):
                model(ids[None, start : min(start + 1024, n)], **cache_argument(cache), logits_to_keep=1)
            lengths = torch.stack([layer.store.packed.lengths for layer in cache.layers]).float()
            rows.append(
                {
                    "model": path.name,
                    "tokens": n,
                    "MiB": cache.nbytes / 2**20,
                    "dense MiB": cache.nbytes_dense / 2**20,
                    "realised": cache.compression_ratio,
                    "tokens per row": n * lengths.numel() / float(lengths.sum()),
                    "smallest head": n / float(lengths.max()),
                    "largest head": n / float(lengths.min()),
                }
            )
    return rows


def picture(rows: list[dict], path: Path) -> None:
    """Tokens per row of every head of every retrofit, layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    ratios = {
        row["model and cache"]: row["tokens"] / torch.tensor(row["rows per head"], dtype=torch.float)
        for row in rows
        if row["rows per head"]
    }
    # means of neighbours are the same everywhere
    ratios = {name: ratio for name, ratio in ratios.items() if ratio.max() > 1.1 * ratio.min()}
    if not ratios:
        return
    norm = LogNorm(1, max(float(ratio.max()) for ratio in ratios.values()))
    widths = [ratio.shape[1] for ratio in ratios.values()]
    figure, axes = plt.subplots(
        1, len(ratios), figsize=(1.2 * sum(widths) + 2, 2.8), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, (name, ratio) in zip(axes[0], ratios.items()):
        image = axis.imshow(ratio.numpy(), cmap="viridis", aspect="auto", norm=norm)
        for layer, head in torch.cartesian_prod(*map(torch.arange, ratio.shape)).tolist():
            value = float(ratio[layer, head])
            colour = "black" if norm(value) > 0.6 else "white"
            label = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
            axis.text(head, layer, label, ha="center", va="center", color=colour)
        axis.set(title=name, xlabel="KV head", xticks=range(ratio.shape[1]), yticks=range(ratio.shape[0]))
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes[0, -1], label="tokens per row")
    figure.savefig(path, dpi=110)
    plt.close(figure)
