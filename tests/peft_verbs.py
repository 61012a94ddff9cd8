"""transformers' own verbs for adapters, where they are to be had: newer releases ask for a PEFT that may not be there.

Where they refuse, each function checks that they say so and change nothing, and does the same by PEFT.
"""

import importlib.metadata

import peft.functional
import pytest
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.integrations.peft import MIN_PEFT_VERSION

ARE_THERE = Version(importlib.metadata.version("peft")) >= Version(MIN_PEFT_VERSION)


def _done(model, verb, *args):
    if ARE_THERE:
        getattr(model, verb)(*args)
        return True
    before = [(type(m), m.active_adapters, m.disable_adapters) for m in layers(model)]
    with pytest.raises(ValueError, match=f"PEFT .* not compatible, please use a version >= {MIN_PEFT_VERSION}"):
        getattr(model, verb)(*args)
    assert [(type(m), m.active_adapters, m.disable_adapters) for m in layers(model)] == before
    return False


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def set_adapter(model, name):
    if not _done(model, "set_adapter", name):
        peft.functional.set_adapter(model, name)


def disable_adapters(model):
    if not _done(model, "disable_adapters"):
        for layer in layers(model):
            layer.enable_adapters(False)


def enable_adapters(model):
    if not _done(model, "enable_adapters"):
        for layer in layers(model):
            layer.enable_adapters(True)


def add_adapter(model, config, name):
    if not _done(model, "add_adapter", config, name):
        peft.inject_adapter_in_model(config, model, name)
        peft.functional.set_adapter(model, name)


def delete_adapter(model, name):
    if not _done(model, "delete_adapter", name):
        for layer in layers(model):
            layer.delete_adapter(name)
        del model.peft_config[name]


def save_pretrained(model, folder):
    """Whether it was saved."""
    return _done(model, "save_pretrained", folder)
