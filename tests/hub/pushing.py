"""Run as a script under HF_ENDPOINT: uploads a repository and adapters, and loads the adapters again."""

import json
import sys

import peft
import torch
import transformers

import hf_kvcache.adapters.dmc_peft
import hf_kvcache.adapters.lowrank
import hf_kvcache.adapters.retaining_peft  # noqa: F401
from hf_kvcache.adapters import DMCConfig, LowRankKVConfig, RetainingHeadConfig
from hf_kvcache.cli import main
from hf_kvcache.models import embedded_model

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

CONFIGS = {
    "bases": lambda: LowRankKVConfig(task_type="CAUSAL_LM", ranks_k=16, ranks_v=32),
    "heads": lambda: RetainingHeadConfig(task_type="CAUSAL_LM", d_r=8),
    "decisions": lambda: DMCConfig(task_type="CAUSAL_LM", method="dms", decision="linear"),
}


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)


def tensors(model):
    return {name: t.sum().item() for name, t in peft.get_peft_model_state_dict(model).items()}


if __name__ == "__main__":
    answer = {"push": main(["push", sys.argv[1], "someone/exported", "--message", "first"])}
    for name, make in CONFIGS.items():
        model = peft.get_peft_model(base(), make())
        model.push_to_hub(f"someone/{name}", token="hf_x")
        back = peft.PeftModel.from_pretrained(base(), f"someone/{name}")
        answer[name] = len(tensors(model)) if tensors(model) == tensors(back) else "differs"
    print("ANSWER " + json.dumps(answer))
