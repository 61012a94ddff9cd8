"""The model that is retrofitted, and the one that teaches it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_kvcache.adapters.dmc_files import RETROFIT
from hf_kvcache.adapters.files import CONFIG
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.adapters.projections import has_norms
from hf_kvcache.dmc.files import load
from hf_kvcache.dmc.retrofitting import retrofit, retrofits
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.models import resolve
from hf_kvcache.trainers.dmc_options import Method, Optimisation, settings_of


def load_model(source: str, attn: str, keeps_dtype: bool = False):
    """A model, retrofitted or not, and the dtype that it was saved in.

    Args:
        source: name or path of a model, or the folder of an adapter.
        attn: attention implementation.
        keeps_dtype: float32 otherwise.

    Raises:
        ValueError: an adapter that goes with LoRA.
    """
    source, tensors = resolve(source), {}
    if (Path(source) / CONFIG).exists():
        if (Path(source) / "lora").exists():
            raise ValueError(f"{source} goes with LoRA, whose training cannot go on here; train from the base model")
        settings, tensors = RETROFIT.read(source)
        source = settings["base_model_name_or_path"]
    config, _ = PreTrainedConfig.get_config_dict(source)
    read = load if "kv_dmc" in config else AutoModelForCausalLM.from_pretrained
    model = read(source, dtype="auto", attn_implementation=attn)
    dtype = model.dtype
    if tensors:
        retrofit(model, RETROFIT.settings(settings, source))
        with torch.no_grad():
            for (i, part), t in tensors.items():
                getattr(retrofits(model)[i], part).copy_(t)
    return model if keeps_dtype else model.float(), dtype


def prepare(model, method: Method, optimisation: Optimisation) -> None:
    """Retrofit a model, or see that it is retrofitted as asked for; say which weights are trained; count steps.

    Raises:
        ValueError: it is retrofitted otherwise, or cannot be.
    """
    children, given = retrofits(model), settings_of(method)
    is_new = not children
    if method.method == "none":
        if children:
            raise ValueError("--method none is for a model that is not retrofitted, and this one is")
    elif is_new:
        if method.adapter:
            given.setdefault("decision", "linear")
        children = retrofit(model, Settings(**given))
    has = next(iter(children.values())).settings if children else None
    if has is not None:
        differing = [f"{k} is {getattr(has, k)!r}, not {v!r}" for k, v in given.items() if getattr(has, k) != v]
        if differing:
            raise ValueError(f"the model was retrofitted with other settings: {'; '.join(differing)}")
    if is_new and has is not None and has.decision == "borrowed":
        if any(has_norms(attention.module) for attention in attentions(model).values()):
            raise ValueError(
                "this model normalises queries and keys, so that no row of its weights can be zeroed to start from "
                "keeping everything; use --decision linear"
            )
    if method.adapter:
        if method.lora_rank:
            from peft import LoraConfig, inject_adapter_in_model

            rank, sides = method.lora_rank, ["q_proj", "k_proj", "v_proj", "o_proj"]
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sides, task_type="CAUSAL_LM")
            inject_adapter_in_model(lora, model, "lora")
        for name, p in model.named_parameters():
            p.requires_grad_(is_decision(name) or "lora_" in name)
            if p.requires_grad:
                p.data = p.data.float()
    # the control run goes through all phases
    takes_out = is_new and (has is None or has.ablates) and not (method.adapter and not method.lora_rank)
    if optimisation.zero_steps is None:
        optimisation.zero_steps = 60 if takes_out else 0
    if optimisation.zero_steps and not takes_out:
        raise ValueError("--zero-steps: there is no channel to take out, or nothing that could learn to do without it")


def is_decision(name: str) -> bool:
    """Whether a parameter is one of those that decide."""
    return ".kv_dmc." in name


def teacher_of(model, method: Method, attn: str):
    """What is distilled, without compression: a copy of the model as it is, or another; None for the same weights.

    Raises:
        ValueError: another one has other tokens.
    """
    if method.loss != "kd" or method.teacher == "self":
        return None
    if method.teacher == "start":
        teacher = copy.deepcopy(model)
    else:
        teacher, _ = load_model(method.teacher, attn, keeps_dtype=False)
        sizes = [m.get_input_embeddings().num_embeddings for m in (teacher, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"--teacher {method.teacher} has {sizes[0]} tokens, the model {sizes[1]}")
    for child in retrofits(teacher).values():
        child.compresses = False
    return teacher.requires_grad_(False).eval()
