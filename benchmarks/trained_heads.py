"""Retaining heads on a real model (Locret) by several targets, and policies without training: needles, query unknown.

Heads learn from facts in prose, whose sentences, words and names are none of those that the needles are made of.
"""

from __future__ import annotations

import json

from hf_kvcache.cli import main as command

RECORD = ["--bf16", "--d-r", "256", "--warmup-steps", "40", "--learning-rate", "2e-3", "--n-recent", "32"]
RECORD += ["--valid-share", "0.05", "--valid-prompts", "4", "--save-steps", "200", "--logging-steps", "50"]
ANSWERS = ["--prompt-tokens", "768", "--answer-tokens", "384", "--prose-share", "0.25"]
REPEATED = ["--prompt-tokens", "512", "--answer-tokens", "384", "--prose-share", "0.3"]
# name -> arguments of the trainer; runs with the same folder of recordings share them
RUNS = {
    "answers": ["--target", "answer_weight", "--recordings", "rec-answer", "--recorded", "80", *ANSWERS],
    "answers, scores before the softmax": [
        *("--target", "answer_max", "--recordings", "rec-answer", "--recorded", "80", *ANSWERS),
    ],
    "repetitions": ["--target", "reconstruction", "--recordings", "rec-repeat", "--recorded", "40", *REPEATED],
}
STEPS = "400"
TASKS = ["niah_single_2", "niah_multikey_1"]
LENGTH = "1024"
RATIOS = ("0.25", "0.125")
TRAINED = ("locret:n_recent=32,ratio={}", "adakv:scorer=locret,ratio={}")
UNTRAINED = ("snapkv", "h2o", "expected_attention", "keydiff", "kvzip")


def heads(options, rows) -> None:
    _evaluate(options, rows, "untrained", None, [f"{name}:ratio={ratio}" for ratio in RATIOS for name in UNTRAINED])
    for name in options.only or RUNS:
        folder = options.work / "heads" / "".join(c if c.isalnum() else "-" for c in name)
        if not (folder / "adapter_config.json").exists():
            _train(options, name, folder)
        report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        rows.add("heads", name, arguments=" ".join(RUNS[name]), steps=STEPS, **report["held out"])
        _evaluate(options, rows, name, folder, [spec.format(ratio) for ratio in RATIOS for spec in TRAINED])


def _train(options, name: str, folder) -> None:
    from hf_kvcache.trainers.train_retaining_heads import main as train

    arguments = ["--model", options.model, "--data", str(options.data / "train"), "--out", str(folder)]
    arguments += ["--max-steps", STEPS, *RECORD, *RUNS[name]]
    at = arguments.index("--recordings") + 1
    arguments[at] = str(options.work / arguments[at])
    if any((folder / "checkpoints").glob("checkpoint-*")):
        arguments += ["--resume"]
    train(arguments)


def _evaluate(options, rows, name: str, adapter, caches: list[str]) -> None:
    """Ask needles of caches, and keep the scores of each as a row."""
    out = options.work / "eval" / "".join(c if c.isalnum() else "-" for c in name)
    asked = ["--model", options.model, "--dtype", "bf16", "--tasks", *TASKS, "--lengths", LENGTH]
    asked += ["--instances", str(options.instances), "--settings", "unknown", "--caches", *caches, "--out", str(out)]
    command(["eval", *asked, *(["--adapter", str(adapter)] if adapter else [])])
    for row in json.loads((out / "eval.json").read_text(encoding="utf-8"))["rows"]:
        score = row["score"]
        rows.add(
            "needles",
            f"{row['task']}, {name}, {row['cache']}",
            score=score["mean"],
            low=score["low"],
            high=score["high"],
            bytes=row["bytes_ratio"],
            n=row["n_instances"],
            answer=row["n_answer"],
        )
