"""The files of a retrofit that left the base model as it is: `peft_type` "KV_DMC", one or two matrices per layer.

Tensors are called `<attention>.kv_dmc.kv_dmc_<decision | importance>`, `[Hkv, hidden]`: the weights themselves, and no
differences to others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from hf_kvcache.adapters import fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.kinds import Kind, are_layers, is_count, is_index, or_none
from hf_kvcache.adapters.modules import RETROFIT_CHILD, full_attentions
from hf_kvcache.dmc.settings import Settings

PARTS = ("decision", "importance")
SETTINGS = tuple(Settings.__dataclass_fields__)

_BORROWED = (
    'decision="borrowed" is in the weights of the whole model, which no adapter holds: save it with '
    'hf_kvcache.dmc.save, or retrofit with decision="linear" or "rows"'
)


def _is_ratio(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _is_subfolder(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value, re.ASCII) is not None


class RetrofitKind(Kind):
    """Weights by which attention merges or drops tokens."""

    peft_type = "KV_DMC"
    title = "an adapter that decides for DMC or DMS"
    child = RETROFIT_CHILD
    parts = PARTS
    config_name = "DMCConfig"
    taken = "is retrofitted"
    card = (
        "Decisions by which attention merges or drops tokens (DMC, arXiv 2403.09636; DMS, arXiv 2506.05345)",
        "dmc",
        "cache = kv.{method}Cache()",
    )
    fields = {
        # `Settings` looks at them, together
        **dict.fromkeys((*SETTINGS, "digest"), lambda value: True),
        "num_kv_heads": is_count,
        "hidden_size": is_count,
        "layers": are_layers,
        "target_ratio": or_none(_is_ratio),
        "achieved_ratio": or_none(_is_ratio),
        "tokens_seen": or_none(is_index),
        "lora": or_none(_is_subfolder),
    }

    def check_further(self, config, where):
        if self.settings(config, where).digest != config.get("digest"):
            raise AdapterError(
                f"{where} has been edited: the weights were trained for other settings, and are useless now"
            )

    def shapes(self, config):
        parts = PARTS if config["method"] == "dmc" else PARTS[:1]
        return {(i, part): (config["num_kv_heads"], config["hidden_size"]) for i in config["layers"] for part in parts}

    def settings(self, config, where: str = "the adapter") -> Settings:
        """The `Settings` of an adapter.

        Raises:
            AdapterError: they are incomplete, impossible, or nothing for an adapter.
        """
        try:
            settings = Settings.from_dict({name: config.get(name) for name in SETTINGS})
        except ValueError as error:
            raise AdapterError(f"{where}: {error}") from error
        if settings.decision == "borrowed":
            raise AdapterError(f"{where}: {_BORROWED}")
        return settings

    def sizes(self, config, attention):
        yield "KV heads", config["num_kv_heads"], attention.n_kv_heads
        yield "hidden size", config["hidden_size"], attention.module.config.hidden_size

    def misfits(self, config, model, found):
        settings, due, own = self.settings(config), sorted(full_attentions(model)), config["layers"]
        D = next(iter(found.values())).head_dim
        problems = []
        if own != due:
            problems.append(f"layers: the adapter decides in {own}, and a cache needs decisions of {due}")
        if settings.ablates and not -D <= settings.neuron < D:
            problems.append(f"neuron: the adapter takes {settings.neuron}, the heads have {D} channels")
        return problems


RETROFIT = RetrofitKind()


def save_adapter(
    model: torch.nn.Module,
    directory: str | os.PathLike,
    *,
    target_ratio: float | None = None,
    achieved_ratio: float | None = None,
    tokens_seen: int | None = None,
    lora: str | None = None,
) -> Path:
    """Write what `retrofit` has put on a model as a PEFT adapter, which `attach` and PEFT put on the base model.

    The base model must be as it was: its own weights are not saved. LoRA that was trained with it is an adapter of its
    own, in a subfolder; `attach` loads both where `lora` names it.

    Args:
        model: with `Retrofit`s of "rows" or "linear" decisions; bare or wrapped by PEFT.
        directory: created if need be; an earlier adapter there is replaced, atomically.
        target_ratio, achieved_ratio, tokens_seen: of the training, for the config.
        lora: subfolder of `directory` that has, or will have, the LoRA without which the decisions are not worth much.

    Raises:
        AdapterError: the model is not retrofitted, or with decisions that are no adapter's.
    """
    from hf_kvcache.dmc.training import common_settings

    settings, found = common_settings(model), full_attentions(model)
    first = found[min(found)]
    config = RETROFIT.config(
        fit.model_name(model, first.module),
        fit.fingerprint(first.module),
        **settings.to_dict(),
        digest=settings.digest,
        layers=sorted(found),
        num_kv_heads=first.n_kv_heads,
        hidden_size=first.module.config.hidden_size,
        target_ratio=target_ratio,
        achieved_ratio=achieved_ratio,
        tokens_seen=tokens_seen,
        lora=lora,
    )
    RETROFIT.check(config, "the adapter")
    rows = {i: dict(zip(PARTS, getattr(a.module, RETROFIT_CHILD).rows())) for i, a in found.items()}
    tensors = {(i, part): t for i, own in rows.items() for part, t in own.items() if t is not None}
    return RETROFIT.write(directory, config, tensors, model)
