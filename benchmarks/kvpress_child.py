"""Run by `against_kvpress.py` in kvpress's own environment: it imports nothing of ours.

python kvpress_child.py TASK.json        prints one JSON line per press
"""

import json
import sys
import time

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "SnapKV": lambda r: kvpress.SnapKVPress(r, window_size=32),
    "PyramidKV": lambda r: kvpress.PyramidKVPress(r, window_size=32),
    "TOVA": lambda r: kvpress.TOVAPress(r),
    "KeyDiff": lambda r: kvpress.KeyDiffPress(r),
    "L2Norm": lambda r: kvpress.KnormPress(r),
    "ExpectedAttention": lambda r: kvpress.ExpectedAttentionPress(r, epsilon=1e-2),
    "LagKV": lambda r: kvpress.LagKVPress(r),
    "StreamingLLM": lambda r: kvpress.StreamingLLMPress(r),
    "Random": lambda r: kvpress.RandomPress(r),
    "AdaKV over SnapKV": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r, window_size=32)),
    "AdaKV over ExpectedAttention": lambda r: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(r, epsilon=1e-2)),
    "AdaKV over KeyDiff": lambda r: kvpress.AdaKVPress(kvpress.KeyDiffPress(r)),
}


def forget(model):
    """Head-wise presses leave their masks on the modules."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


@torch.no_grad()
def main():
    task = json.load(open(sys.argv[1]))
    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    for ratio in task["ratios"]:
        for name, make in PRESSES.items():
            found = {"policy": name, "kept": ratio}
            try:
                found |= answers(model, make, ratio, task) | {"step ms": decode(model, make, ratio, task)}
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"[:200]
            forget(model)
            print(json.dumps(found), flush=True)


def prefill(model, press, context):
    forget(model)
    cache = DynamicCache()
    with press(model):
        model(context, past_key_values=cache, logits_to_keep=1)
    return cache


def answers(model, make, ratio, task):
    """Share of questions answered, each after the right answer to the one before, and bytes after the prompt."""
    n_right = n_asked = nbytes = dense = 0
    for prompt in task["prompts"]:
        context = torch.tensor([prompt["context"]])
        cache = prefill(model, make(1 - ratio), context)
        nbytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        dense += 2 * 4 * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers) * context.shape[1]
        position, said = context.shape[1], []
        for ask, answer in zip(prompt["asks"], prompt["answers"]):
            ids = torch.tensor([said + ask])
            where = torch.arange(position, position + ids.shape[1])[None]
            logits = model(ids, past_key_values=cache, position_ids=where, logits_to_keep=1).logits[0, -1]
            n_right += int(logits.argmax()) == answer
            n_asked, position, said = n_asked + 1, position + ids.shape[1], [answer]
    return {"retrieval": n_right / n_asked, "bytes": nbytes / dense}


def decode(model, make, ratio, task):
    """Milliseconds per decoded token after the long prompt, median."""
    ids = torch.tensor([task["long"]])
    cache = prefill(model, make(1 - ratio), ids)
    times, token = [], ids[:, -1:]
    for i in range(task["n_steps"]):
        where = torch.tensor([[ids.shape[1] + i]])
        started = time.perf_counter()
        token = model(token, past_key_values=cache, position_ids=where).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e3


if __name__ == "__main__":
    main()
