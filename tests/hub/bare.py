"""Run as a script: loads exported repositories where hf_kvcache, PEFT and Triton cannot be found.

python bare.py JOBS.json: `{"work": folder, "repositories": {name: {"where", "dtype", "inputs", ...}}}` -> JSON lines
"""

import copy
import json
import sys
import warnings
from pathlib import Path

from hiding import hide

hide("hf_kvcache", "peft", "triton")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, pipeline  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def load(where, dtype, kind=AutoModelForCausalLM, **kwargs):
    return kind.from_pretrained(where, dtype=getattr(torch, dtype), trust_remote_code=True, **kwargs).eval()


def tokens(model, job, **kwargs):
    inputs = {name: torch.tensor(values) for name, values in job["inputs"].items()}
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **kwargs)
    return out.sequences.tolist(), out.past_key_values


def ways(model, job) -> dict[str, list]:
    """By how a cache is given: whether it is the one that comes back, and how many tokens it has seen.

    Nothing given: the class of the cache that is made.
    """
    ids, n = torch.tensor(job["inputs"]["input_ids"])[:1], 3
    options = dict(max_new_tokens=n, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    answers = {"forward": [type(model(ids, use_cache=True).past_key_values).__name__, None]}
    for name in ("cache", "past_key_values"):
        calls = {f"forward {name}": lambda **given: model(ids, **given)}
        calls[f"generate {name}"] = lambda **given: model.generate(ids, **given, **options)
        for what, call in calls.items():
            mine = model.new_cache()
            answers[what] = [call(**{name: mine}).past_key_values is mine, mine.get_seq_length() - ids.shape[1]]
    mine, other = model.new_cache(), model.new_cache()
    # input_ids, attention_mask, position_ids
    answers["forward by place"] = [model(ids, None, None, mine).past_key_values is mine, 0]
    both = model(ids, cache=(mine := model.new_cache()), past_key_values=other)
    answers["forward both"] = [both.past_key_values is mine, other.get_seq_length()]
    return answers


def run(job, work: Path) -> dict:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load(job["where"], job["dtype"])
        custom = {"custom_generate": job["custom"], "trust_remote_code": True} if "custom" in job else {}
        found, cache = tokens(model, job, **custom)
    answer = {
        "tokens": found,
        "nbytes": cache.nbytes,
        "nbytes_dense": cache.nbytes_dense,
        "copied": copy.deepcopy(cache).nbytes,
        "cache": type(cache).__name__,
        "class": type(model).__name__,
        "warnings": [str(w.message) for w in said if "kvcache" in str(w.message) or "kernel" in str(w.message)],
    }
    if "custom" in job:
        answer["goes on"] = {}
        for name in ("cache", "past_key_values"):
            # an empty one, whose class the first call has made
            mine = type(cache)(codec=cache.codec, config=model.config)
            answer["goes on"][name] = [tokens(model, job, **custom, **{name: mine})[1] is mine, mine.nbytes]
    if "custom" not in job:
        with torch.no_grad(), warnings.catch_warnings():
            # transformers says so of old names
            warnings.simplefilter("error", FutureWarning)
            answer["ways"] = ways(model, job)
        try:
            AutoModelForCausalLM.from_pretrained(job["where"], trust_remote_code=False)
        except ValueError as error:
            answer["without trust"] = str(error)
    if job.get("thoroughly"):
        plain = load(job["where"], job["dtype"], AutoModel)
        with torch.no_grad():
            answer["cache of AutoModel"] = type(plain(torch.tensor([[5, 6, 7]])).past_key_values).__name__
        try:
            cache.save(work / "cache")
        except ImportError as error:
            answer["does without"] = str(error)
        answer["rows of beams"] = len(tokens(model, job, num_beams=2)[0])
        # saved again, by transformers alone
        model.save_pretrained(work / "again")
        answer["saved again"] = tokens(load(work / "again", job["dtype"]), job)[0]
    if job.get("scores"):
        inputs = {name: torch.tensor(values) for name, values in job["inputs"].items()}
        with torch.no_grad():
            answer["scores"] = model(**inputs, use_cache=False).logits[:, -1].tolist()
            answer["relaxed"] = model.train()(**inputs, use_cache=False).logits[:, -1].tolist()
    if job.get("text"):
        writes = pipeline("text-generation", model=job["where"], dtype="float32", trust_remote_code=True)
        answer["text"] = writes(job["text"], max_new_tokens=8, do_sample=False)[0]["generated_text"]
    return answer


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for name, job in jobs["repositories"].items():
        print("ANSWER " + json.dumps({name: run(job, Path(jobs["work"]))}), flush=True)
