"""kvpress on the instances of `hf-kvcache eval`: the same token ids behind its presses, and behind our methods.

python benchmarks/evaluate_presses.py --kvpress-python PYTHON --model smollm2 --out DIR [--tasks …] [--instances N]

kvpress 0.5.5 needs transformers below 5.3, so it runs in an environment of its own (`pip install kvpress==0.5.5`), in
a process that imports nothing of ours: it gets token ids and says token ids. DIR/answers.jsonl takes every answer as
soon as there is one; DIR/presses has them as lines of an evaluation, scored by our tasks, for `hf-kvcache report`.
DIR/ours is `hf-kvcache eval` of our methods with kvpress's conventions, and with our own defaults. The same command
goes on where it was stopped. DIR/presses.json compares the two: scores, and answers that are the same token for token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from hf_kvcache.cli import main as cli
from hf_kvcache.eval.intervals import difference_of
from hf_kvcache.eval.lines import Line, Lines
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.running import Settings, build_instance
from hf_kvcache.eval.tasks import tasks_named
from hf_kvcache.models import resolve

TASKS = ["niah_single_2", "niah_multikey_1"]

# a press, and our method with its conventions, then with our defaults. What it does not have: sinks and recent tokens
# that always stay, eviction while decoding
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
        "adakv:ratio={r},scorer=expected_attention,n_recent=0,decode=false",
        "adakv:ratio={r},scorer=expected_attention",
    ),
    "kvzip": ("kvzip:ratio={r}", "kvzip:ratio={r}"),
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
        _ask_ours(args, out / "ours")
    lines, about = _lines(args, out)
    table = compare(lines, Lines(out / "ours" / "eval.jsonl", _about(out / "ours")), args.ratio)
    (out / "presses.json").write_text(json.dumps(about | {"rows": table}, indent=1) + "\n", encoding="utf-8")
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


def _ask_ours(args, out: Path) -> None:
    """Our methods, by kvpress's conventions first, then by our own; what is there is not asked again."""
    command = ["eval", "--model", args.model, "--dtype", "fp32", "--device", "cpu", "--out", str(out)]
    command += ["--tasks", *args.tasks, "--lengths", str(args.length), "--instances", str(args.instances)]
    command += ["--batch-size", "4", "--settings", "known", "unknown", "--caches"]
    for side in range(1 if args.conventions_only else 2):
        caches = dict.fromkeys(PAIRS[name][side].format(r=args.ratio) for name in args.presses)
        with redirect_stdout(sys.stderr):
            cli([*command, *caches])


def _about(folder: Path) -> dict:
    return json.loads((folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0])


def _lines(args, out: Path) -> tuple[list[Line], dict]:
    """The answers of presses, decoded and scored, also written as an evaluation of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(resolve(args.model)))
    asked = {(task.name, i): (task, instance) for task, i, instance, _ in _instances(args, tokenizer)}
    # what ours was measured with, but for the library
    about = _about(out / "ours")
    about["versions"] = {"torch": about["versions"]["torch"], "transformers": "5.2.0", "kvpress": "0.5.5"}
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
    lines = Lines(path, about)
    for line in found:
        lines.add(line)
    return found, about


def compare(presses: list[Line], ours: Lines, ratio: float) -> list[dict]:
    """A row per press and setting: both scores, their paired difference, the share of answers that are the same."""
    known: dict[str, dict[tuple, Line]] = {}
    for line in (*presses, *ours):
        if line.error is None:
            known.setdefault(line.cache, {})[line.setting, line.task, line.instance, line.question] = line
    rows = []
    for name, texts in PAIRS.items():
        press = known.get("kvpress:none" if name == "none" else f"kvpress:{name}:ratio={ratio}", {})
        alike, default = (known.get(text.format(r=ratio), {}) for text in texts)
        for setting in ("known", "unknown"):
            keys = [key for key in press if key[0] == setting and key in alike]
            # our defaults may not have been asked yet
            sides = (press, alike, default) if all(key in default for key in keys) else (press, alike)
            if keys:
                rows.append(_row(name, setting, [[found[key] for key in keys] for found in sides]))
    return rows


def _row(name: str, setting: str, sides: list[list[Line]]) -> dict:
    press, alike = sides[:2]
    scores = [[line.score for line in side] for side in sides]
    gain = difference_of(scores[1], scores[0])
    return {
        "press": name,
        "setting": setting,
        "n": len(press),
        "kvpress": sum(scores[0]) / len(press),
        "ours, its conventions": sum(scores[1]) / len(press),
        "difference": [gain.mean, gain.low, gain.high],
        "same answers": sum(a.answer == b.answer for a, b in zip(press, alike, strict=True)) / len(press),
        "ours": sum(scores[2]) / len(press) if len(scores) > 2 else None,
        "bytes": [sum(line.nbytes for line in side) / sum(line.n_read for line in side) for side in sides],
    }


if __name__ == "__main__":
    raise SystemExit(main())
