"""Calibrate the bases of a low-rank cache: one model, one text, one adapter.

    hf-kvcache calibrate lowrank --model ID_OR_PATH --text FILE --rank 0.5 --out ADAPTER

The adapter is a PEFT folder. Use it with `LowRankCache.from_adapter(ADAPTER)`, or load it into the model
(`PeftModel.from_pretrained(model, ADAPTER)`), whose `LowRankCache()` then finds it.
`python -m hf_kvcache.trainers.calibrate_lowrank` takes the same arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import add_model_arguments, check_writable, load_model, read_text
from hf_kvcache.commands.numbers import count, fraction, heads, positive, share

ALLOCATORS = ("measured", "greedy", "uniform", "fisher", "condition")
DIRECTIONS = ("gradient", "rows", "weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        metavar="FILE_FOLDER_OR_DATASET",
        help="a UTF-8 file, a folder of .txt files, or a dataset id of the Hub as ID[:CONFIG] (default: the embedded "
        "prose)",
    )
    text.add_argument("--column", default="text", help="column of a dataset (default: %(default)s)")
    text.add_argument(
        "--samples", type=positive, default=128, help="texts to run through the model (default: %(default)s)"
    )
    text.add_argument(
        "--length",
        type=positive,
        default=2048,
        help="tokens of a text (default: %(default)s); with --rope post as many as contexts will have, because keys "
        "after RoPE turn with their positions",
    )
    text.add_argument(
        "--prose-share",
        type=fraction,
        default=0.5,
        metavar="SHARE",
        help="of the samples, those that are text alone; in the others facts are hidden and asked for, without which "
        "bases lose how a model finds something again (default: %(default)s)",
    )
    basis = parser.add_argument_group("bases")
    basis.add_argument("--rank", type=share, default=0.5, help="share of a dense cache's bytes (default: %(default)s)")
    basis.add_argument("--rope", choices=("pre", "post"), default="pre", help="where keys are projected")
    basis.add_argument("--group-size-k", type=heads, default=1, metavar="N", help="KV heads that share key latents")
    basis.add_argument(
        "--group-size-v", type=heads, default="all", metavar="N", help="the same of values (default: all of them)"
    )
    basis.add_argument(
        "--directions",
        choices=DIRECTIONS,
        default="gradient",
        help="errors are weighed by the gradient of the loss, by nothing (principal components of the rows), or known "
        "from the weights alone (default: %(default)s)",
    )
    basis.add_argument(
        "--allocator",
        choices=ALLOCATORS,
        default="measured",
        help="how ranks are shared out: by measured loss, by loss estimated from gradients, all alike, by Fisher "
        "information (Palu), by condition number (LoRC) (default: %(default)s)",
    )
    basis.add_argument("--no-centre", action="store_true", help="do not subtract the mean row")
    basis.add_argument("--refine", type=count, default=0, metavar="N", help="passes through the low-rank model")
    basis.add_argument(
        "--measured",
        type=positive,
        default=4,
        metavar="N",
        help="samples that --allocator measured reads eight times for every layer (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hf_kvcache.calibration import fit_bases
    from hf_kvcache.calibration.text import mixed_batches

    check_writable(args.out, "--out")
    model, tokenizer = load_model(args)
    ids = read_tokens(args, tokenizer)
    length = min(args.length, getattr(model.config, "max_position_embeddings", args.length))
    try:
        batches = mixed_batches(tokenizer, ids, length, args.samples, args.prose_share)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("")
            bases = fit_bases(
                model,
                batches,
                rank=args.rank,
                rope=args.rope,
                group_size_k=args.group_size_k,
                group_size_v=args.group_size_v,
                directions=args.directions,
                allocator=args.allocator,
                centre=not args.no_centre,
                refine=args.refine,
                n_measured=args.measured,
                on_progress=lambda stage, done, total: progress.update(
                    task, description=stage, completed=done, total=total
                ),
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    bases.save(args.out)
    print(json.dumps(summary(bases, sum(batch.numel() for batch in batches)), indent=1))


def summary(bases, n_tokens: int) -> dict:
    """What to print of a calibration: bytes and ranks."""
    dense = 2 * len(bases.layers) * bases.n_kv_heads * bases.head_dim * 2
    return {
        "calibration tokens": n_tokens,
        "bytes per token, 16 bit": bases.nbytes_per_token(2),
        "of a dense cache": round(bases.nbytes_per_token(2) / dense, 4),
        "ranks of keys": [ranks.get("k") for ranks in bases.ranks.values()],
        "ranks of values": [ranks.get("v") for ranks in bases.ranks.values()],
    }


def read_tokens(args: argparse.Namespace, tokenizer):
    """Token ids `[n]` of the text that was asked for."""
    import torch

    from hf_kvcache.models import embedded_prose

    source = args.text or embedded_prose()
    if Path(source).is_dir():
        from hf_kvcache.trainers.dmc_data import load_stream

        try:
            stream = load_stream(Path(source), tokenizer, args.samples * args.length)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text: {error}") from error
        return torch.from_numpy(stream).long()
    if Path(source).exists():
        text = read_text(source, "--text")
    else:
        text = read_dataset(str(source), args.column, n_characters=8 * args.samples * args.length)
    # the text is longer than the model's context on purpose: it is cut into samples
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]


def read_dataset(name: str, column: str, n_characters: int) -> str:
    """The beginning of a dataset's training split.

    Raises:
        UserError: it is neither a file nor a dataset that can be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"--text {name!r} is not a file; to read it as a dataset, pip install datasets") from error
    identity, _, config = name.partition(":")
    parts, n = [], 0
    try:
        for row in load_dataset(identity, config or None, split="train", streaming=True):
            parts.append(row[column])
            n += len(row[column])
            if n >= n_characters:
                break
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--text {name!r}: {error}") from error
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"calibrate_lowrank: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
