"""The README of an exported repository: metadata for the Hub, and what somebody has to know who loads it."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from hf_kvcache import registry

# what rows are, and the method of the registry whose paper says so
_SOURCES = {
    "palu": ("low-rank latents", "lowrank"),
    "mustafar": ("the largest channels of every token", "sparse"),
    "locret": ("the tokens that trained heads retain", "locret"),
    "dmc": ("rows that the model merges by itself", "dmc"),
    "dms": ("rows that the model drops by itself", "dms"),
    "quant": ("integers of few bits", "quant"),
}

_TEXT = """---
{metadata}
---

# {causal_lm}

{base} whose KV cache holds {what}.
`generate` uses it unless it is given another cache.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "this repository"  # or a folder
tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
cache = model.new_cache()  # what `generate` makes unasked
out = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), cache=cache)
print(tokenizer.decode(out[0]), cache.nbytes)  # bytes allocated
```

Releases of transformers before 5.24 call the argument `past_key_values`; this model takes a cache under either name.

The code in this repository needs torch and transformers, nothing else; kernels run where Triton and a GPU are (compute
capability 8.0 or newer), plain PyTorch elsewhere. It is that of hf_kvcache {version}, whole modules, only with imports
for one folder: `stores_uniform.py` is the library's `stores/uniform.py`. The library has faster kernels for CPUs, and
its documentation holds for these files, too.

## The cache

```json
{spec}
```
{command}
## Measured

{measured}

## Limits

- Without `trust_remote_code=True` the model is not loaded: its type, `{model_type}`, is none of transformers' own.
- The cache cannot be compiled statically. Attention implementations other than sdpa and eager get dense rows, one
  layer at a time, or raise where rows have been evicted.
- The licence of the weights is the base model's; that of the code is Apache 2.0.
"""

_NOT_MEASURED = "Nothing was, for this card: `hf-kvcache export` does, unless `--no-measure` is given."

_TABLE = """\
| | `DynamicCache` | this cache |
|---|---|---|
| bytes after {n_tokens:,} tokens | {dense_bytes:,} | {nbytes:,} ({bytes_ratio:.3f}) |
| perplexity of {n_windows} x {n_next} tokens, each after {n_prefix} | {dense_perplexity:.2f} | {perplexity:.2f} |
| KL from the model with a dense cache, nats per token | 0 | {kl:.4f} |
| questions about {eval_context:,} tokens of prose answered | {dense_retrieval:.0%} | {retrieval:.0%} |
| speed of decoding | 1 | {speedup:.2f} |

On {device}, {dtype}, torch {torch}, transformers {transformers}. The text is the prose that hf_kvcache brings along;
every prediction was made through the cache. The speed is a ratio within one run of the library, in which both caches
took turns.
"""


def card_of(
    base_model: str | None,
    names: dict[str, str],
    family: str,
    spec: str,
    command: str | None = None,
    license: str | None = None,
    measured: dict | None = None,
) -> str:
    """A model card.

    Args:
        base_model: name on the Hub, or None.
        names: of the classes, see `export`.
        family: key of what is said of the method.
        spec: the arguments of the cache as JSON.
        command: that made the repository, or None.
        license: of the weights, as the Hub writes it ("apache-2.0"), or None.
        measured: values of the fields of the table, or None.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["kv-cache", "kv-cache-compression", family],
        model_name=names["causal_lm"],
        eval_results=None if measured is None else _results(measured),
    )
    return _TEXT.format(
        metadata=data.to_yaml(),
        what=_what(family),
        spec=spec,
        command="" if command is None else f"\nMade by `{command}`.\n",
        measured=(_NOT_MEASURED if measured is None else _TABLE.format(**measured)).rstrip(),
        **names,
    )


def _what(family: str) -> str:
    """What the rows of a family are, with its paper."""
    if family not in _SOURCES:
        return "compressed rows"
    rows, method = _SOURCES[family]
    return f"{rows} ({registry.method(method).source})"


def _results(measured: dict) -> list[EvalResult]:
    """What the Hub shows beside the card."""
    found = {"perplexity": "Perplexity", "kl": "KL from the dense cache", "bytes_ratio": "Bytes, of the dense cache"}
    where = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": "prose of hf_kvcache"}
    return [
        EvalResult(metric_type=key, metric_name=name, metric_value=round(measured[key], 4), **where)
        for key, name in found.items()
    ]
