"""Run as a script under HF_ENDPOINT, beside `peft_verbs`: uploads a repository and adapters, loads these again."""

import json
import sys
import tempfile
from pathlib import Path

import peft
import peft_verbs
import torch
import transformers
from huggingface_hub import HfApi

import hf_kvcache as kv
from hf_kvcache.adapters import DMCConfig, LowRankKVConfig, RetainingHeadConfig, RetainingHeads, attached_basis
from hf_kvcache.cli import main
from hf_kvcache.compat import cache_argument
from hf_kvcache.models import embedded_model

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

OURS = {
    "bases": lambda: LowRankKVConfig(task_type="CAUSAL_LM", ranks_k=16, ranks_v=32),
    "fewer": lambda: LowRankKVConfig(task_type="CAUSAL_LM", ranks_k=8, ranks_v=8),
    "heads": lambda: RetainingHeadConfig(task_type="CAUSAL_LM", d_r=8),
    "decisions": lambda: DMCConfig(task_type="CAUSAL_LM", method="dms", decision="linear", window=4, offset=0.5),
}
CONFIGS = OURS | {
    "style": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2),
}


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)


def new_adapter(name):
    """With values of its own wherever an untrained one does nothing."""
    model, generator = peft.get_peft_model(base(), CONFIGS[name]()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tensors(model):
    return {name: t.sum().item() for name, t in peft.get_peft_model_state_dict(model).items()}


# -- several on one model ----------------------------------------------------------------------------------------------


def put(model, name):
    if name in OURS:
        kv.attach(model, f"someone/{name}", name)
    else:
        model.load_adapter(f"someone/{name}", adapter_name=name)


def model_with(*names):
    model = base()
    for name in names:
        put(model, name)
    return model.eval()


IDS = torch.arange(5, 105)[None] % 200


@torch.no_grad()
def logits(model, cache=None):
    """Of a forward pass; with a cache, of generated tokens."""
    if cache is None:
        return model(IDS, use_cache=False).logits
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.cat(model.generate(IDS, **cache_argument(cache), **options).logits)


def low_rank(**bases):
    return kv.LowRankCache(window=4, n_sink=0, **bases)


def locret():
    return kv.LocretCache(budget=32, chunk=32, local=4, stabilizers=4)


def mixed(order):
    """What is true of a model that carries all but decisions, which were loaded in this order."""
    model, plain, styled = model_with(*order), base(), model_with("style")
    attention = model.model.layers[0].self_attn
    facts = {}

    def rank():
        found = attached_basis(attention, "k")
        return None if found is None else found[0].rank

    def same(what, ours, theirs):
        facts[what] = torch.equal(ours, theirs)

    peft_verbs.set_adapter(model, "bases")
    facts["rank of bases"] = rank()
    same("without LoRA it is the base", logits(model), logits(plain))
    bases, fewer = (low_rank(bases=kv.Bases.load(f"someone/{name}")) for name in ("bases", "fewer"))
    same("latents of the base", logits(model, low_rank()), logits(plain, bases))
    peft_verbs.set_adapter(model, "fewer")
    facts["rank of fewer"] = rank()
    peft_verbs.set_adapter(model, "style")
    same("LoRA", logits(model), logits(styled))
    facts["LoRA differs"] = not torch.equal(logits(model), logits(plain))
    facts["rank beside LoRA"] = rank()
    same("latents beside LoRA", logits(model, low_rank()), logits(styled, fewer))
    same("heads beside LoRA", logits(model, locret()), logits(model_with("style", "heads"), locret()))
    peft_verbs.disable_adapters(model)
    same("disabled it is the base", logits(model), logits(plain))
    facts["rank of none"] = rank()
    peft_verbs.enable_adapters(model)
    same("LoRA again", logits(model), logits(styled))
    peft_verbs.delete_adapter(model, "fewer")
    facts["rank after deletion"] = rank()
    return facts


def nested():
    """PEFT's own classes: one of ours around LoRA, and another kind beside it."""
    styled = peft.PeftModel.from_pretrained(base(), "someone/style", adapter_name="style").eval()
    expected = logits(styled)
    wrapped = peft.PeftModel.from_pretrained(styled, "someone/bases", adapter_name="bases")
    wrapped.load_adapter("someone/fewer", "fewer")
    kv.attach(wrapped, "someone/heads", "heads")
    facts = {"LoRA beneath": torch.equal(logits(wrapped), expected)}
    module = wrapped.get_base_model().get_base_model().model.layers[0].self_attn
    for name in ("fewer", "bases"):
        wrapped.set_adapter(name)
        facts[name] = attached_basis(module, "k")[0].rank
    with wrapped.disable_adapter():
        facts["disabled"] = attached_basis(module, "k") is None
    return facts


def deciding():
    """Decisions and LoRA on one model, loaded in either order."""
    first, second = model_with("decisions", "style"), model_with("style", "decisions")
    both, plain, alone = logits(first, kv.DMSCache()), base(), logits(model_with("decisions"), kv.DMSCache())
    facts = {"either order": torch.equal(logits(second, kv.DMSCache()), both)}
    for model in (first, second):
        peft_verbs.set_adapter(model, "decisions")
        facts["without LoRA"] = torch.equal(logits(model, kv.DMSCache()), alone)
        peft_verbs.set_adapter(model, "style")
        facts["both again"] = torch.equal(logits(model, kv.DMSCache()), both)
        peft_verbs.disable_adapters(model)
        facts["disabled it is the base"] = torch.equal(logits(model), logits(plain))
    facts["each matters"] = not any(torch.equal(a, b) for a, b in ((both, alone), (alone, logits(plain, kv.KVCache()))))
    return facts


def refusals():
    """What loaders say of a repository with a pickle and without tensors."""
    with tempfile.TemporaryDirectory() as folder:
        RetainingHeads.load("someone/heads").save(folder)
        Path(folder, "adapter_model.safetensors").rename(Path(folder, "adapter_model.bin"))
        HfApi().create_repo("someone/pickled")
        HfApi().upload_folder(repo_id="someone/pickled", folder_path=folder)
    said = []
    for load in (kv.attach, peft.PeftModel.from_pretrained):
        try:
            load(base(), "someone/pickled")
        except kv.adapters.AdapterError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    answer = {"push": main(["push", sys.argv[1], "someone/exported", "--message", "first"])}
    for name in CONFIGS:
        model = new_adapter(name)
        model.push_to_hub(f"someone/{name}", token="hf_x")
        back = peft.PeftModel.from_pretrained(base(), f"someone/{name}")
        answer[name] = len(tensors(model)) if tensors(model) == tensors(back) else "differs"
    # as a folder, which goes with its card
    with tempfile.TemporaryDirectory() as folder:
        RetainingHeads.load("someone/heads").save(folder)
        HfApi().create_repo("someone/carded")
        HfApi().upload_folder(repo_id="someone/carded", folder_path=folder)
    answer["carded"] = len(RetainingHeads.load("someone/carded").tensors)
    answer["pickled"] = refusals()
    order = ["bases", "heads", "style", "fewer"]
    answer["mixed"] = [mixed(order), mixed(order[::-1])]
    answer["nested"] = nested()
    answer["deciding"] = deciding()
    print("ANSWER " + json.dumps(answer))
