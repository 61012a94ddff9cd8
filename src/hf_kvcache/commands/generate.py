"""Continue a prompt behind one cache; print the text, then bytes and speed.

`--save DIR` keeps the compressed prompt; `--load DIR` goes on from it, after more text if `--prompt` gives some:

    hf-kvcache generate --prompt-file book.txt --cache quant:bits=4 --save book
    hf-kvcache generate --load book --prompt "What happened then?"
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import (
    add_model_arguments,
    check_writable,
    load_model,
    parse_specs,
    read_text,
    retrofitted,
)
from hf_kvcache.commands.numbers import positive, temperature

PROMPT = "prompt.json"
DEFAULT_CACHE = "quant:bits=4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("text")
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue")
    group.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to generate (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="sample at this temperature (default: 0, greedy)",
    )
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--cache",
        metavar="SPEC",
        help=f"as in `hf-kvcache compare` (default: {DEFAULT_CACHE}, or a retrofitted model's own)",
    )
    group.add_argument(
        "--chunk", type=positive, metavar="N", help="read the prompt N tokens at a time, and evict in between"
    )
    group.add_argument("--save", metavar="DIR", help="write the compressed prompt there before generating")
    group.add_argument("--load", metavar="DIR", help="start from a prompt written by --save")


def run(args: argparse.Namespace) -> None:
    if args.load and args.cache:
        raise UserError("--load brings its own cache; leave --cache out")
    text = read_text(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    if not text and not args.load:
        raise UserError("give a text to continue: --prompt TEXT or --prompt-file FILE")
    typed = parse_specs([args.cache])[0] if args.cache else None
    if args.save:
        check_writable(Path(args.save), "--save", (PROMPT,))
    model, tokenizer = load_model(args)
    spec = typed or parse_specs([retrofitted(model) or DEFAULT_CACHE])[0]
    try:
        if args.load:
            cache, known = _load(Path(args.load), model)
        else:
            cache, known = spec.build(model.config), []
        ids = known + tokenizer(text or "", add_special_tokens=not known)["input_ids"]
        if args.save:
            _save(Path(args.save), model, cache, ids)
        _generate(model, tokenizer, cache, ids, args)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(str(error)) from error


def _generate(model, tokenizer, cache, ids: list[int], args: argparse.Namespace) -> None:
    """Stream the continuation to stdout and a line of numbers to stderr."""
    from time import perf_counter

    import torch

    from hf_kvcache.compat import cache_argument
    from hf_kvcache.eval.memory import cache_nbytes
    from hf_kvcache.long_prompts import prefill, reads_twice

    streamer = timed_streamer(tokenizer)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    n_loaded = cache.get_seq_length()
    prompt, started = torch.tensor([ids], device=model.device), perf_counter()
    if args.chunk or reads_twice(cache):
        prefill(model, prompt, cache, chunk=args.chunk)
    model.generate(
        prompt,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        **cache_argument(cache),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **sampling,
    )
    _, first, *later = streamer.times
    held = cache_nbytes(cache)
    parts = [f"{cache.get_seq_length():,} tokens", f"cache {held / 2**20:.2f} MiB"]
    dense = getattr(cache, "nbytes_dense", None)
    if dense:
        parts.append(f"{held / dense:.3f} of the dense {dense / 2**20:.2f} MiB")
    parts.append(f"first token after {first - started:.2f} s ({len(ids) - n_loaded:,} tokens read)")
    if later:
        parts.append(f"{len(later) / (later[-1] - first):.1f} tokens/s")
    print(" · ".join(parts), file=sys.stderr)


def timed_streamer(tokenizer):
    """A `TextStreamer` that remembers when the prompt went in and when each token came out."""
    from time import perf_counter

    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer, skip_prompt=True)
            self.times = []

        def put(self, value):
            self.times.append(perf_counter())
            super().put(value)

    return TimedStreamer()


def _save(folder: Path, model, cache, ids: list[int]) -> None:
    """Prefill all but the last token, which generation feeds itself, and write cache and token ids."""
    import torch

    from hf_kvcache.compat import cache_argument
    from hf_kvcache.long_prompts import prefill, reads_twice

    if not hasattr(cache, "save"):
        raise UserError(f"--save: a {type(cache).__name__} cannot be saved; use one of this package's caches")
    n_cached = cache.get_seq_length()
    if len(ids) - 1 <= n_cached:
        raise UserError("--save needs a prompt of at least two new tokens")
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        if reads_twice(cache):
            prefill(model, prompt, cache)
        else:
            model(prompt[:, n_cached:-1], **cache_argument(cache), use_cache=True, logits_to_keep=1)
    cache.save(folder)
    (folder / PROMPT).write_text(json.dumps({"ids": ids}), encoding="utf-8")


def _load(folder: Path, model):
    from hf_kvcache import KVCache

    cache = KVCache.load(folder, model=model)
    try:
        ids = json.loads((folder / PROMPT).read_text(encoding="utf-8"))["ids"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--load: {str(folder)!r} was not written by `hf-kvcache generate --save`: {error}") from error
    if len(ids) != cache.get_seq_length() + 1:
        raise UserError(f"--load: {PROMPT} in {str(folder)!r} belongs to another cache; save the prompt again")
    return cache, ids
