"""Our adapters' names among those that PEFT knows: `hf_kvcache.adapters.register` puts them there.

PEFT asks a closed enum which methods exist and has no entry point for others, so members are added to it.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from hf_kvcache.adapters import files


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name`, added if it is not there yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    # the enum's own __setattr__ forbids this
    type.__setattr__(PeftType, name, member)
    return member


def register(kind: PeftType, config_cls: type, model_cls: type) -> None:
    """Make a method known to `get_peft_model`, `PeftModel` and transformers; once is enough."""
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        name = kind.value.lower()
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
        # what files call it; the config knows its kind by itself
        PEFT_TYPE_TO_CONFIG_MAPPING[files.written(kind.value)] = config_cls
