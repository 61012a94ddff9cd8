"""Random retaining heads on tiny models, and what they see in a forward pass."""

from functools import partial

import torch
import torch.nn.functional as F
from cases import prompt

from hf_kvcache.adapters import RetainingHeads, attached_heads
from hf_kvcache.adapters.modules import attentions, full_attentions

KINDS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


def heads_of(model, d_r=8, scale=25.0, **fields):
    """Heads that fit a model, whose scores are about one."""
    heads = RetainingHeads.new(model, d_r, **fields)
    return RetainingHeads(
        {i: tuple(scale * t for t in own) for i, own in heads.layers.items()},
        base_model="tiny/model",
        fingerprint=heads.fingerprint,
        **heads.settings,
    )


def formula(features, fc1, fc2, activation="silu"):
    """Scores `[B, Hkv, S]` in float64."""
    hidden = KINDS[activation](torch.einsum("bsf,rf->bsr", features.double(), fc1.double()))
    return torch.einsum("bsr,hr->bhs", hidden, fc2.double())


def watch(model, what=lambda child: (child.features(), child.scores())):
    """A dictionary that every forward pass fills: by layer, `what` its heads say while its attention runs."""
    seen = {}

    def look(module, args, kwargs, output):
        seen.pop(module.layer_idx, None)
        if attached_heads(module) is not None:
            seen[module.layer_idx] = what(attached_heads(module))

    for attention in attentions(model).values():
        attention.module.register_forward_hook(look, with_kwargs=True, prepend=True)
    return seen


def hidden_states(model):
    """A dictionary that every forward pass fills: by layer, what went into its attention `[B, S, hidden]`."""
    seen = {}

    def look(module, args, kwargs):
        seen[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for attention in attentions(model).values():
        attention.module.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@torch.no_grad()
def by_hand(module, hidden, norm):
    """Features `[B, S, F]` of an attention module from its input, without hooks."""
    batch, n_tokens, _ = hidden.shape
    head_dim, n_kv_heads = module.head_dim, module.config.num_key_value_heads
    if hasattr(module, "qkv_proj"):
        width = n_kv_heads * head_dim
        n_query = module.config.num_attention_heads * head_dim
        q, k, v = module.qkv_proj(hidden).split([n_query, width, width], -1)
    else:
        q, k, v = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
    if norm:
        q, k = (
            of(t.view(batch, n_tokens, -1, head_dim)).reshape(t.shape)
            for of, t in ((module.q_norm, q), (module.k_norm, k))
        )
    return torch.cat([q, k, v], -1)


def assert_same_heads(ours, theirs, dtype=torch.float32):
    """Two `RetainingHeads` say the same and hold the same tensors, of this dtype."""
    assert ours.config() == theirs.config()
    for place, t in ours.tensors.items():
        assert theirs.tensors[place].dtype == dtype
        assert torch.equal(theirs.tensors[place], t.to(dtype)), f"{place} differs"


def assert_scores(model, heads):
    """A forward pass offers the features and the scores that these heads make of them, and leaves nothing behind."""
    seen, inputs = watch(model), hidden_states(model)
    with torch.no_grad():
        model(prompt(2, 7))
    assert seen.keys() == full_attentions(model).keys()
    for i, (features, scores) in seen.items():
        module = attentions(model)[i].module
        assert torch.equal(features, by_hand(module, inputs[i], heads.feature_point == "norm"))
        assert scores.dtype == torch.float32
        expected = formula(features, *heads.layers[i], heads.activation)
        assert (scores - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
