"""Run as a script where Triton interprets: exported models whose every op runs as its Triton kernel, then as PyTorch.

python interpreted.py FOLDER...: a JSON line for each, with what ran and how far the logits are apart.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def run(where):
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, attn_implementation="eager").eval()
    package = type(model).__module__.rpartition(".")[0]
    kernels = sys.modules[f"{package}.kernels"]
    stores = [cls for name in list(sys.modules) if name.startswith(package) for cls in vars(sys.modules[name]).values()]
    for cls in stores:
        if isinstance(cls, type) and "is_at_hand" in vars(cls):
            # rows are placed as on a GPU
            cls.is_at_hand = False
    ran, module = set(), kernels._module

    def noted(op, backend):
        ran.add((op, backend))
        return module(op, backend)

    kernels._module = noted
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 120, (2, 60), generator=generator), torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    options = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    logits = {}
    for backend in ("triton", "reference"):
        kernels.fast_backend = lambda device, backend=backend: backend
        with torch.no_grad():
            out = model.generate(ids, output_logits=True, eos_token_id=None, **options)
        logits[backend] = torch.stack(out.logits)
        if backend == "triton":
            used = sorted(ran)
    difference = (logits["triton"] - logits["reference"]).abs().max().item()
    return {"used": used, "difference": difference, "scale": logits["reference"].std().item()}


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print("ANSWER " + json.dumps({folder: run(folder)}), flush=True)
