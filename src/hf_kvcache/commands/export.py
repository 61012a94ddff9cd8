"""Write a model with its compressed cache as a repository that needs only transformers.

    hf-kvcache export --method quant:bits=4 --out llama-4bit
    hf-kvcache export --method palu --adapter my-bases --out llama-palu
    hf-kvcache export --model my-dmc --method dmc --out llama-dmc
    hf-kvcache export --method quant:bits=4 --any-model --out kv-4bit
    hf-kvcache export --config kv_cache_config.json --out llama-tuned

`AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True).generate(...)` then uses that cache, and with
`--any-model` any `model.generate(..., custom_generate=OUT, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
import functools
import shlex
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, check_writable, load_model, parse_specs, say_written

NAMES = {"palu": "lowrank", "mustafar": "sparse"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("repository")
    group = group.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--method",
        metavar="SPEC",
        help="palu, mustafar, locret, dmc, dms, quant with arguments (quant:bits=4), or a cache as in `compare`",
    )
    group.add_argument("--config", metavar="FILE", help="cache that a file describes, such as `hf-kvcache tune` writes")
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    group.add_argument(
        "--any-model", action="store_true", help="no model, but a `custom_generate` repository for those that have one"
    )
    group.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub writes it (apache-2.0)")
    group.add_argument("--no-measure", action="store_true", help="leave bytes, quality and speed out of the model card")


def run(args: argparse.Namespace) -> None:
    if args.config:
        spec = parse_specs([f"config:{args.config}"])[0]
    else:
        name, colon, rest = args.method.partition(":")
        spec = parse_specs([NAMES.get(name, name) + colon + rest])[0]
    if spec.is_peer:
        raise UserError(f"--method {args.method}: that is transformers' own cache, which needs no repository")
    check_writable(Path(args.out), "--out")
    from hf_kvcache.hub.export import export, export_generate

    if args.any_model:
        try:
            return say_written(export_generate(spec.build(), args.out))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(str(error)) from error
    model, tokenizer = load_model(args)
    facts = {"command": _command(args), "license": args.license}
    if not args.no_measure:
        facts["measured"] = functools.partial(measure, model, tokenizer, spec)
    try:
        where = export(model, spec.build(model.config), args.out, tokenizer=tokenizer, **facts)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error
    return say_written(where)


def _command(args: argparse.Namespace) -> str:
    """What was typed, for others to read: folders by their last name only."""
    parts = ["hf-kvcache", "export"]
    for option in ("model", "dtype", "adapter", "method", "config", "out", "license"):
        value = getattr(args, option)
        if value is not None:
            is_path = option == "out" or Path(value).exists()
            parts += [f"--{option}", Path(value).name if is_path else value]
    return shlex.join(parts)


def measure(model, tokenizer, spec) -> dict:
    """What the card's table says, from a small `compare`."""
    import torch
    import transformers

    from hf_kvcache.eval.compare import Settings, compare, with_baseline
    from hf_kvcache.models import embedded_prose

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    n_tokens = min(1024, most - 32)
    settings = Settings(
        context=n_tokens,
        eval_context=n_tokens,
        n_new=32,
        n_windows=2,
        n_prompts=2,
        attention=model.config._attn_implementation,
    )
    dense, ours = compare(model, tokenizer, embedded_prose().read_text(), with_baseline([spec]), settings)
    for row in (dense, ours):
        if row.error:
            raise UserError(f"{row.cache} could not be measured ({row.error}); --no-measure leaves that out")
    device = model.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return vars(settings) | {
        "n_tokens": settings.context + settings.n_new,
        "n_prefix": settings.n_prefix,
        "dense_bytes": dense.nbytes,
        "dense_perplexity": dense.perplexity,
        "dense_retrieval": dense.retrieval,
        "nbytes": ours.nbytes,
        "bytes_ratio": ours.bytes_ratio,
        "perplexity": ours.perplexity,
        "kl": ours.kl,
        "retrieval": ours.retrieval,
        "speedup": ours.speedup,
        "device": named,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
