"""Run by `evaluate_presses.py` in kvpress's own environment: answers behind presses, as token ids.

Imports nothing of ours.

python press_answers.py TASK.json ANSWERS.jsonl     goes on where the file of answers ends
"""

import json
import sys
from pathlib import Path

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache

# by kvpress's own defaults: the argument is the share that is removed
PRESSES = {
    "none": lambda r: kvpress.KnormPress(0.0),
    "streaming": kvpress.StreamingLLMPress,
    "snapkv": kvpress.SnapKVPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "tova": kvpress.TOVAPress,
    "keydiff": kvpress.KeyDiffPress,
    "knorm": kvpress.KnormPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "lagkv": kvpress.LagKVPress,
    # as in its leaderboard
    "adakv-expected_attention": lambda r: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(r, epsilon=1e-2)),
    "kvzip": kvpress.KVzipPress,
    "observed_attention": kvpress.ObservedAttentionPress,
}
# wants attention weights
EAGER = {"observed_attention"}


@torch.no_grad()
def main():
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype, attn_implementation="sdpa").eval()
    known = {key(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    for item in task["items"]:
        for setting in task["settings"]:
            for name, ratio in task["presses"]:
                asked = item["about"] | {"setting": setting, "press": name, "ratio": ratio}
                if key(asked | {"question": len(item["questions"]) - 1}) in known:
                    continue
                for line in answers(model, item, setting, name, ratio, task["stops"]):
                    with out.open("a") as file:
                        file.write(json.dumps(asked | line) + "\n")


def key(line):
    return tuple(line[name] for name in ("task", "length", "instance", "setting", "press", "ratio", "question"))


def answers(model, item, setting, name, ratio, stops):
    """A line for every question; an error is one, too."""
    model.set_attn_implementation("eager" if name in EAGER else "sdpa")
    for q, ids in enumerate(item["questions"]):
        try:
            read = item["context"] + (ids if setting == "known" else [])
            cache, logits = prefill(model, PRESSES[name](1 - ratio), read)
            found = {"n_read": len(read), "nbytes": nbytes(model, cache), "n_asked": 0}
            position = len(read)
            if setting == "unknown":
                logits, found["n_asked"] = feed(model, cache, ids, position), len(ids)
                position += len(ids)
            said = decode(model, cache, logits, position, stops, item["max_new_tokens"][q])
            yield {"question": q, "said": said, **found}
        except Exception as error:
            yield {"question": q, "error": f"{type(error).__name__}: {error}"[:300]}


def prefill(model, press, ids):
    for layer in model.model.layers:
        # head-wise presses leave their masks on the modules
        layer.self_attn.masked_key_indices = None
    cache = DynamicCache()
    with press(model):
        logits = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return cache, logits


def feed(model, cache, ids, position):
    """Logits behind tokens whose positions are those of the text, whatever the cache has kept."""
    where = torch.arange(position, position + len(ids))[None]
    return model(torch.tensor([ids]), past_key_values=cache, position_ids=where, logits_to_keep=1).logits[0, -1]


def decode(model, cache, logits, position, stops, n_new):
    """The greedy answer, without the token that ends it."""
    said = []
    while (token := int(logits.argmax())) not in stops:
        said.append(token)
        if len(said) == n_new:
            break
        logits = feed(model, cache, [token], position)
        position += 1
    return said


def nbytes(model, cache):
    """Bytes of rows that attention looks at: head-wise presses mask the others and free none."""
    total = 0
    for layer, rows in zip(model.model.layers, cache.layers):
        masked = layer.self_attn.masked_key_indices
        n_rows = rows.keys.shape[1] * rows.keys.shape[2] - (0 if masked is None else len(masked[0]))
        total += 2 * n_rows * rows.keys.shape[3] * rows.keys.element_size()
    return total


if __name__ == "__main__":
    main()
