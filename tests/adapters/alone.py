"""Run as a script: what a user sees who loads adapters and lacks one of the packages.

python alone.py HIDDEN BASE ADAPTER ADAPTER ...: hides a package -> what every loader says, as a JSON line
"""

import importlib.abc
import json
import sys
import warnings

HIDDEN, BASE, *ADAPTERS = sys.argv[1:]


class Hiding(importlib.abc.MetaPathFinder):
    """A finder that says of one package that there is none."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hiding())
warnings.simplefilter("error", UserWarning)

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402


def base():
    return AutoModelForCausalLM.from_pretrained(BASE)


def with_peft(adapter):
    import peft

    return {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(base(), adapter),
        "PeftConfig": lambda: peft.PeftConfig.from_pretrained(adapter),
        "AutoPeftModel": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
        "load_adapter": lambda: base().load_adapter(adapter),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    }


def with_ours(adapter):
    import hf_kvcache as kv

    # from_pretrained believes the metadata of a package that cannot be imported
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE))
    return {"attach": lambda: kv.attach(model, adapter), "config": lambda: kv.adapters.LowRankKVConfig}


if __name__ == "__main__":
    loaders, said = with_ours if HIDDEN == "peft" else with_peft, {}
    for adapter in ADAPTERS:
        for name, load in loaders(adapter).items():
            try:
                load()
            except (ImportError, KeyError) as error:
                said[f"{name} {adapter}"] = f"{type(error).__name__}: {error}"
    print("ANSWER " + json.dumps(said))
