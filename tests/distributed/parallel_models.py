"""The models of the jobs in `sharded.py`, random and saved, so that several processes load the same."""

from pathlib import Path

import torch
from cases import ARCHITECTURES, SIZES, new_model
from sharded import RETROFITS, bases_of
from tiny_heads import heads_of
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.adapters import attach
from hf_kvcache.dmc import Settings, retrofit, retrofits
from hf_kvcache.hub.export import export


def save_models(folder: Path, exported: bool = False) -> Path:
    """All models and adapters that jobs name, in a folder; exported ones, which take longest, if asked for."""
    for arch in ("llama", "qwen3", "gemma2", "phi3"):
        new_model(ARCHITECTURES[arch](), "sdpa" if arch != "gemma2" else "eager").save_pretrained(folder / arch)
    four = LlamaConfig(**SIZES | dict(num_attention_heads=8, num_key_value_heads=4))
    new_model(four, "sdpa").save_pretrained(folder / "four-heads")
    for arch in ("llama", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(folder / arch, dtype=torch.float32)
        heads_of(model).save(folder / f"heads-{arch}", model)
    for name, knobs in RETROFITS.items():
        model = retrofitted(new_model(LlamaConfig(**SIZES), "sdpa"), Settings(offset=0.5, scale=5.0, **knobs))
        dmc.save(model, folder / name)
    if exported:
        export_some(folder)
    return folder


def export_some(folder: Path) -> None:
    def read(name, load=AutoModelForCausalLM.from_pretrained):
        return load(folder / name, dtype=torch.float32)

    latents, locret = read("four-heads"), read("qwen3")
    attach(latents, bases_of(latents.config, 2))
    attach(locret, folder / "heads-qwen3")
    export(latents, kv.LowRankCache(bits=4, window=8), folder / "exported-latents")
    export(locret, kv.LocretCache(budget=24, local=4, interval=4), folder / "exported-locret")
    export(read("dmc-linear", dmc.load), kv.DMCCache(), folder / "exported-dmc-linear")


def retrofitted(model, settings):
    retrofit(model, settings)
    generator = torch.Generator().manual_seed(1)
    for child in retrofits(model).values():
        for rows in child.rows():
            if rows is not None:
                rows.data = torch.randn(rows.shape, generator=generator) * 0.2
    return model
