"""Random bases on tiny models: not good ones, but no two alike."""

import torch
from cases import ARCHITECTURES, new_model, stock_implementation

from hf_kvcache.adapters import Bases
from hf_kvcache.adapters.modules import full_attentions
from hf_kvcache.codecs.basis import Basis

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3"]


def model_of(arch="llama", dtype=torch.float32, seed=0):
    """A new model, to be changed at will."""
    return new_model(ARCHITECTURES[arch](), stock_implementation(arch), seed=seed).to(dtype)


def random_basis(n_kv_heads, head_dim, group_size, rank, centred, generator):
    """An orthogonal projection around a mean."""
    n_groups, width = n_kv_heads // group_size, group_size * head_dim
    down = torch.linalg.qr(torch.randn(n_groups, width, width, generator=generator)).Q[..., :rank]
    up = down.mT.unflatten(2, (group_size, head_dim)).transpose(1, 2)
    mean = torch.randn(n_groups, width, generator=generator) if centred else None
    return Basis(down.contiguous(), up.contiguous(), mean)


def random_bases(model, ranks=(8, 12), group_sizes=(1, 2), centred=True, rope="pre", seed=0, alternate=1, **more):
    """Bases that fit a model, tied to it; every other layer has `alternate` directions less."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for i, attention in full_attentions(model).items():
        layers[i] = {
            side: random_basis(
                attention.n_kv_heads, attention.head_dim, s, rank - i % 2 * alternate, centred, generator
            )
            for side, rank, s in zip("kv", ranks, group_sizes)
        }
    return Bases(layers, rope, **more).made_for(model, "tiny/model")


def assert_same_bases(ours, theirs, dtype=torch.float32):
    """Two `Bases` say the same and hold the same tensors, of this dtype."""
    assert ours.config() == theirs.config()
    for i, sides in ours.layers.items():
        for side, basis in sides.items():
            other = theirs.of(i, side).tensors
            assert other.keys() == basis.tensors.keys()
            for part, t in basis.tensors.items():
                assert other[part].dtype == dtype
                assert torch.equal(other[part], t.to(dtype)), f"layer {i}, {side}, {part} differs"
