"""The three kinds of adapters on one tiny model, the ways to load them, and what can be wrong with their files."""

import json

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import model_of, random_bases
from tiny_heads import heads_of

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.adapters import save_adapter

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def save_bases(folder):
    random_bases(model_of()).save(folder, model_of())


def save_heads(folder):
    heads_of(model_of()).save(folder, model_of())


def save_decisions(folder):
    model = model_of()
    dmc.retrofit(model, dmc.Settings(decision="linear", offset=0.5, scale=5.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for child in dmc.retrofits(model).values():
            for rows in (child.decision, child.importance):
                rows.copy_(0.15 * torch.randn(rows.shape, generator=generator))
    save_adapter(model, folder)


# what saves it, its child, a tensor of layer 0, and a cache that uses it
KINDS = {
    "bases": (save_bases, "kv_lowrank", "k_down", lambda: kv.LowRankCache(window=4, n_sink=0)),
    "heads": (save_heads, "kv_retain", "fc2", lambda: kv.LocretCache(budget=8, chunk=8, local=2, stabilizers=2)),
    "decisions": (save_decisions, "kv_dmc", "decision", kv.DMCCache),
}


def name_of(kind, layer_idx=0):
    _, child, part, _ = KINDS[kind]
    return f"base_model.model.model.layers.{layer_idx}.self_attn.{child}.{child}_{part}"


# -- loaders: of a folder, onto a model, which comes back --------------------------------------------------------------


def by_attach(model, folder):
    kv.attach(model, folder, "kv")
    return model


def by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder, adapter_name="kv")


def by_transformers(model, folder):
    model.load_adapter(str(folder), "kv")
    return model


def by_peft_beside(model, folder):
    """A second adapter, beside one that is all right."""
    wrapped = peft.PeftModel.from_pretrained(model, folder.with_name("good"), adapter_name="good")
    wrapped.load_adapter(folder, "kv")
    wrapped.set_adapter("kv", inference_mode=True)
    return wrapped


CAREFUL = {"attach": by_attach, "PeftModel": by_peft, "PeftModel.load_adapter": by_peft_beside}
LOADERS = CAREFUL | {"transformers": by_transformers}


# -- damage ------------------------------------------------------------------------------------------------------------


def rewrite(folder, drop=(), **more):
    tensors = {name: t for name, t in load_file(folder / TENSORS).items() if name not in drop} | more
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def change(folder, kind, by):
    name = name_of(kind)
    rewrite(folder, **{name: by(load_file(folder / TENSORS)[name]).contiguous()})


def reword(folder, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def pickled(folder, kind):
    """What PEFT would fall back on."""
    torch.save(load_file(folder / TENSORS), folder / PICKLE)
    (folder / TENSORS).unlink()


def refingerprint(folder, **fields):
    made = json.loads((folder / CONFIG).read_text())["fingerprint"]
    reword(folder, fingerprint=made | fields)


def shorten(folder, kind):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])


SIZES = {"bases": "n_kv_heads", "heads": "feature_dim", "decisions": "hidden_size"}
LM_HEAD, PATH = "base_model.model.lm_head.weight", "base_model.model.../../x.weight"
FILE_DAMAGE = {
    "pickle": (pickled, "pickled"),
    "pickle in disguise": (lambda f, kind: torch.save({}, f / TENSORS), "no safetensors file"),
    "truncated": (shorten, "no safetensors file"),
    "empty": (lambda f, kind: (f / TENSORS).write_bytes(b""), "no safetensors file"),
    "a folder": (lambda f, kind: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "is missing"),
}
TENSOR_DAMAGE = {
    "missing tensor": (lambda f, kind: rewrite(f, drop=[name_of(kind)]), "of layer 0 is missing"),
    "foreign tensor": (lambda f, kind: rewrite(f, **{LM_HEAD: torch.zeros(128, 32)}), "no name"),
    "path in a name": (lambda f, kind: rewrite(f, **{PATH: torch.zeros(1)}), "no name"),
    "layer out of range": (lambda f, kind: rewrite(f, **{name_of(kind, 99): torch.zeros(1)}), "not among the tensors"),
    "wrong shape": (lambda f, kind: change(f, kind, lambda t: t[:1]), "of shape"),
    "transposed": (lambda f, kind: change(f, kind, lambda t: t.mT), "of shape"),
    "wrong dtype": (lambda f, kind: change(f, kind, torch.Tensor.double), "F64|float64"),
    "integers": (lambda f, kind: change(f, kind, torch.Tensor.long), "I64|int64"),
    "NaN": (lambda f, kind: change(f, kind, lambda t: t * torch.nan), "NaN"),
    "infinity": (lambda f, kind: change(f, kind, lambda t: t + torch.inf), "infinity"),
}
CONFIG_DAMAGE = {
    "a later format": (lambda f, kind: reword(f, format_version=2), "format_version 2"),
    "no format": (lambda f, kind: reword(f, format_version=None), "format_version None"),
    "enormous": (lambda f, kind: reword(f, **{SIZES[kind]: 10**12}), "says|damaged"),
    "negative": (lambda f, kind: reword(f, **{SIZES[kind]: -1}), "damaged or missing"),
    "nothing": (lambda f, kind: reword(f, **{SIZES[kind]: 0}), "damaged or missing"),
    "half": (lambda f, kind: reword(f, **{SIZES[kind]: 0.5}), "damaged or missing"),
    "text": (lambda f, kind: reword(f, **{SIZES[kind]: "8"}), "damaged or missing"),
    "layers without end": (lambda f, kind: refingerprint(f, num_hidden_layers=10**12), "fingerprint"),
    "a list for a layer": (lambda f, kind: refingerprint(f, layer=[]), "fingerprint"),
    "a list for a version": (lambda f, kind: reword(f, hf_kvcache_version=[1]), "damaged or missing"),
    "another model": (lambda f, kind: refingerprint(f, weights="0" * 32), "weights: the adapter is for"),
    "a longer model": (lambda f, kind: refingerprint(f, num_hidden_layers=3), "layers: the adapter is for 3"),
}
# what PEFT reads before it knows whose adapter it is: errors are its own
FOREIGN_DAMAGE = {
    "no json": lambda f, kind: (f / CONFIG).write_text("{"),
    "binary": lambda f, kind: (f / CONFIG).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f, kind: (f / CONFIG).write_text("[]"),
    "deep": lambda f, kind: (f / CONFIG).write_text("[" * 100_000),
    "no config": lambda f, kind: (f / CONFIG).unlink(),
    "unknown kind": lambda f, kind: reword(f, peft_type="../../etc"),
    "a kind of numbers": lambda f, kind: reword(f, peft_type=7),
    "a list of kinds": lambda f, kind: reword(f, peft_type=["KV_DMC"]),
}
