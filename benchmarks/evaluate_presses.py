"""kvpress on the instances of `hf-kvcache eval`: the same token ids behind its presses, and behind our methods.

python benchmarks/evaluate_presses.py --kvpress-python PYTHON --model smollm2 --out DIR [--tasks …] [--instances N]

kvpress 0.5.5 needs transformers below 5.3, so it runs in an environment of its own (`pip install kvpress==0.5.5`), in
a process that imports nothing of ours: it gets token ids and says token ids. DIR/answers.jsonl takes every answer as
soon as there is one; DIR/presses has them as lines of an evaluation, scored by our tasks, for `hf-kvcache report`.
DIR/conventions has our methods with kvpress's conventions, among them that nothing is evicted from a question which
follows a compressed text; DIR/ours has them with our own defaults. The same command goes on where it was stopped.
DIR/presses.json compares the two: scores, and answers that are the same token for token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from hf_kvcache.cli import main as cli
from hf_kvcache.commands.common import load_model
from hf_kvcache.eval.intervals import difference_of
from hf_kvcache.eval.lines import Line, Lines
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.report import about
from hf_kvcache.eval.running import Plan, Settings, build_instance, evaluate
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.tasks import tasks_named
from hf_kvcache.models import embedded_model, resolve
from hf_kvcache.policies.base import Policy

TASKS = ["niah_single_2", "niah_multikey_1"]

# a press, and our method with its conventions, then with our defaults. What it does not have: sinks, recent tokens and,
# where heads differ, a dense window that always stay; eviction while decoding
PLAIN = "n_sink=0,n_recent=0,decode=false"
PAIRS = {
    "none": ("dense", "dense"),
    "streaming": ("streaming:ratio={r},n_recent=0,decode=false", "streaming:ratio={r}"),
    "snapkv": (
        "snapkv:ratio={r},n_queries=64,n_recent=64,kernel=5,pooling=avg,n_sink=0,decode=false",
        "snapkv:ratio={r}",
    ),
    "pyramidkv": (
        "pyramidkv:ratio={r},n_queries=64,n_recent=64,kernel=5,pooling=avg,n_sink=0,decode=false",
        "pyramidkv:ratio={r}",
    ),
    "tova": ("tova:ratio={r},n_sink=0,n_recent=1,decode=false", "tova:ratio={r}"),
    "keydiff": (f"keydiff:ratio={{r}},{PLAIN}", "keydiff:ratio={r}"),
    "knorm": (f"l2norm:ratio={{r}},{PLAIN}", "l2norm:ratio={r}"),
    "expected_attention": (
        "expected_attention:ratio={r},n_recent=0,epsilon=0.0,decode=false",
        "expected_attention:ratio={r}",
    ),
    "lagkv": ("lagkv:ratio={r},n_recent=0,decode=false", "lagkv:ratio={r}"),
    "adakv-expected_attention": (
        "adakv:ratio={r},scorer=expected_attention,n_recent=0,decode=false+dense:window=0",
        "adakv:ratio={r},scorer=expected_attention",
    ),
    "kvzip": ("kvzip:ratio={r}+dense:window=0", "kvzip:ratio={r}"),
    "observed_attention": ("h2o:ratio={r},n_sink=0,n_recent=0,recent_share=0.0,decode=false", "h2o:ratio={r}"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", metavar="FILE", help="interpreter that has kvpress; without, what is there")
    parser.add_argument("--model", default="smollm2", metavar="ID_OR_PATH", help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--instances", type=int, default=8, metavar="N", help="of every task (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.25, metavar="R", help="that is kept (default: %(default)s)")
    parser.add_argument("--presses", nargs="+", default=list(PAIRS), choices=PAIRS, metavar="NAME", help="default: all")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--skip-ours", action="store_true", help="ask presses only")
    parser.add_argument("--conventions-only", action="store_true", help="leave out our own defaults")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.kvpress_python:
        _ask_presses(args, out)
    if not args.skip_ours:
        _ask_by_conventions(args, out / "conventions")
        if not args.conventions_only:
            _ask_by_defaults(args, out / "ours")
    presses, known = _lines(args, out)
    ours = [_read(out / name) for name in ("conventions", "ours")]
    table = compare(presses, *ours, args.ratio)
    if Path(args.model).resolve() == embedded_model().resolve():
        known["model"] = "the embedded model"
    (out / "presses.json").write_text(json.dumps(known | {"rows": table}, indent=1) + "\n", encoding="utf-8")
    for row in table:
        print(json.dumps(row))
    return 0


def _instances(args, tokenizer):
    """Task, number, instance and prompt: those that `hf-kvcache eval` asks."""
    settings, prompter = Settings(), Prompter(tokenizer)
    for i in range(args.instances):
        for task in tasks_named(",".join(args.tasks)):
            instance = build_instance(task, prompter, args.length, i, settings)
            yield task, i, instance, prompter.prompt(instance)


def _ask_presses(args, out: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    where = str(resolve(args.model))
    tokenizer = AutoTokenizer.from_pretrained(where)
    ends = GenerationConfig.from_pretrained(where).eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    items = [
        {
            "about": {"task": task.name, "length": args.length, "instance": i},
            "context": prompt.context,
            "questions": prompt.questions,
            "max_new_tokens": [question.max_new_tokens for question in instance.questions],
        }
        for task, i, instance, prompt in _instances(args, tokenizer)
    ]
    task = {
        "model": where,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "stops": sorted(stops),
        "settings": ["known", "unknown"],
        "presses": [(name, args.ratio) for name in args.presses],
        "items": items,
    }
    (out / "task.json").write_text(json.dumps(task), encoding="utf-8")
    child = Path(__file__).parent / "press_answers.py"
    subprocess.run([args.kvpress_python, str(child), str(out / "task.json"), str(out / "answers.jsonl")], check=True)


def once(kind: type[Policy]) -> type[Policy]:
    """A policy that evicts from what a cache reads first, and from nothing that follows, such as a question."""

    def should_evict(self, n_kept, tokens_seen, decoding, n_since):
        is_first = n_since == tokens_seen
        return is_first and kind.should_evict(self, n_kept, tokens_seen, decoding, n_since)

    return type(f"Once{kind.__name__}", (kind,), {"should_evict": should_evict})


def _ask_by_conventions(args, out: Path) -> None:
    """Our methods, as presses do it; what is there is not asked again."""
    specs = [parse(PAIRS[name][0].format(r=args.ratio)) for name in args.presses]
    specs = [replace(spec, policy=once(spec.policy)) if spec.policy else spec for spec in specs]
    options = argparse.Namespace(model=args.model, dtype="fp32", device="cpu", adapter=None, attn="hf_kvcache")
    model, tokenizer = load_model(options)
    settings, tasks = Settings(), tuple(tasks_named(",".join(args.tasks)))
    lines = Lines(out / "eval.jsonl", about(settings, model, args.model) | {"adapter": None})
    plan = Plan(tasks, (args.length,), args.instances, ("known", "unknown"), tuple(specs), batch_size=2)
    evaluate(model, tokenizer, plan, settings, lines)


def _ask_by_defaults(args, out: Path) -> None:
    """The same with our own defaults, by the command."""
    command = ["eval", "--model", args.model, "--dtype", "fp32", "--device", "cpu", "--out", str(out)]
    command += ["--tasks", *args.tasks, "--lengths", str(args.length), "--instances", str(args.instances)]
    caches = dict.fromkeys(PAIRS[name][1].format(r=args.ratio) for name in args.presses)
    with redirect_stdout(sys.stderr):
        cli([*command, "--batch-size", "2", "--settings", "known", "unknown", "--caches", *caches])


def _read(folder: Path) -> Lines:
    """What is there."""
    return Lines(folder / "eval.jsonl", _about(folder)) if (folder / "eval.jsonl").exists() else Lines(None, {})


def _about(folder: Path) -> dict:
    return json.loads((folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0])


def _lines(args, out: Path) -> tuple[list[Line], dict]:
    """The answers of presses, decoded and scored, also written as an evaluation of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve(args.model)))
    asked = {(task.name, i): (task, instance) for task, i, instance, _ in _instances(args, tokenizer)}
    # what ours was measured with, but for the library
    known = _about(out / "conventions")
    known["versions"] = {"torch": known["versions"]["torch"], "transformers": "5.2.0", "kvpress": "0.5.5"}
    found = []
    for text in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        raw = json.loads(text)
        if (raw["task"], raw["instance"]) not in asked or raw["ratio"] != args.ratio:
            continue
        task, instance = asked[raw["task"], raw["instance"]]
        name = "kvpress:none" if raw["press"] == "none" else f"kvpress:{raw['press']}:ratio={raw['ratio']}"
        key = raw["task"], raw["length"], raw["instance"], raw["setting"], name, raw["question"]
        if "error" in raw:
            found.append(Line(*key, error=raw["error"]))
            continue
        answer = tokenizer.decode(raw["said"], skip_special_tokens=True)
        score = float(task.score(answer, instance.questions[raw["question"]]))
        sizes = {name: raw[name] for name in ("n_read", "n_asked", "nbytes")}
        filled = "direct: a press, whose bytes are those of the rows that attention looks at"
        found.append(Line(*key, answer=answer, n_answer=len(raw["said"]), score=score, filled=filled, **sizes))
    (out / "presses").mkdir(exist_ok=True)
    path = out / "presses" / "eval.jsonl"
    path.unlink(missing_ok=True)
    lines = Lines(path, known)
    for line in found:
        lines.add(line)
    return found, known


def compare(presses: list[Line], conventions: Lines, defaults: Lines, ratio: float) -> list[dict]:
    """A row per press and setting: scores, their paired difference, the share of answers that are the same."""
    sides = [_by_cache(lines) for lines in (presses, conventions, defaults)]
    rows = []
    for name, texts in PAIRS.items():
        names = ["kvpress:none" if name == "none" else f"kvpress:{name}:ratio={ratio}"]
        names += [text.format(r=ratio) for text in texts]
        press, alike, default = (side.get(text, {}) for side, text in zip(sides, names, strict=True))
        for setting in ("known", "unknown"):
            keys = [key for key in press if key[0] == setting and key in alike]
            # our defaults may not have been asked yet
            found = (press, alike, default) if all(key in default for key in keys) else (press, alike)
            if keys:
                rows.append(_row(name, setting, [[side[key] for key in keys] for side in found]))
    return rows


def _by_cache(lines) -> dict[str, dict[tuple, Line]]:
    found: dict[str, dict[tuple, Line]] = {}
    for line in lines:
        if line.error is None:
            found.setdefault(line.cache, {})[line.setting, line.task, line.instance, line.question] = line
    return found


def _row(name: str, setting: str, sides: list[list[Line]]) -> dict:
    press, alike = sides[:2]
    scores = [[line.score for line in side] for side in sides]
    gain = difference_of(scores[1], scores[0])
    return {
        "press": name,
        "ours": alike[0].cache,
        "setting": setting,
        "n": len(press),
        "kvpress score": sum(scores[0]) / len(press),
        "score": sum(scores[1]) / len(press),
        "difference": [gain.mean, gain.low, gain.high],
        "same answers": sum(a.answer == b.answer for a, b in zip(press, alike, strict=True)) / len(press),
        "default score": sum(scores[2]) / len(press) if len(scores) > 2 else None,
        "bytes per token": [sum(line.nbytes for line in side) / sum(line.n_read for line in side) for side in sides],
    }


if __name__ == "__main__":
    raise SystemExit(main())
