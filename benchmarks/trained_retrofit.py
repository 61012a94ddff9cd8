"""A retrofit of a real model that drops tokens (DMS at 4x), as an adapter: ratio realised, perplexity and needles."""

from __future__ import annotations

import json

from hf_kvcache.cli import main as command

COMMON = ["--method", "dms", "--ratio", "4", "--window", "64", "--sequence", "512", "--batch-size", "1", "--bf16"]
COMMON += ["--prose-share", "0.5", "--skip-eos", "--hinge-weight", "3", "--save-steps", "20", "--logging-steps", "5"]
# name -> arguments of the trainer
RUNS = {
    "dms-4x, adapter": [
        *("--adapter", "--decision", "linear", "--decision-lr-factor", "1", "--scale", "10", "--lr", "2e-3"),
        *("--final-lr", "2e-4", "--ramp-steps", "120", "--solid-steps", "60", "--kd-direction", "forward"),
    ],
}
TASKS = ["niah_single_2", "niah_multikey_1"]


def retrofit(options, rows) -> None:
    for name in options.only or RUNS:
        folder = options.work / "retrofits" / "".join(c if c.isalnum() else "-" for c in name)
        if not (folder / "adapter_config.json").exists():
            _train(options, name, folder)
        report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        last = [entry for entry in report["log"] if "ratio" in entry][-1]
        kept = {key: report[key] for key in ("seconds", "tokens", "ratio", "target")}
        rows.add("retrofit", name, arguments=" ".join([*COMMON, *RUNS[name]]), ce=last["ce"], kd=last["kd"], **kept)
        out = options.work / "eval" / folder.name
        asked = [
            "--model",
            options.model,
            "--dtype",
            "bf16",
            "--tasks",
            *TASKS,
            "--lengths",
            "1024",
            "--settings",
            "unknown",
        ]
        asked += ["--instances", str(options.instances), "--caches", "dms", "--adapter", str(folder), "--out", str(out)]
        command(["eval", *asked])
        for row in json.loads((out / "eval.json").read_text(encoding="utf-8"))["rows"]:
            score = {key: row["score"][key] for key in ("mean", "low", "high")}
            rows.add("needles", f"{row['task']}, {name}, {row['cache']}", bytes=row["bytes_ratio"], **score)


def _train(options, name: str, folder) -> None:
    from hf_kvcache.trainers.train_dmc import main as train

    arguments = ["--model", options.model, "--data", str(options.data / "train"), "--out", str(folder)]
    resume = ["--resume"] if any((folder / "checkpoints").glob("checkpoint-*")) else []
    train([*arguments, *COMMON, *RUNS[name], *resume])
