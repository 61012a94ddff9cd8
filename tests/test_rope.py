"""Rotary positions: the model's own rotation, at any position, and back."""

import pytest
import torch
from cases import ARCHITECTURES, tiny_model

from hf_kvcache.adapters.modules import attentions
from hf_kvcache.rope import FINE, Rope, rotate
from hf_kvcache.rope_of_model import rope_of


def a_rope(size=64, theta=500000.0, **knobs):
    return Rope(theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size), **knobs)


@pytest.mark.parametrize("position", [0, 1, FINE - 1, FINE, 4095, 100_003, 1_000_000])
def test_tables_are_the_angles(position):
    rope = a_rope()
    rope.cover(position + 1, torch.device("cpu"))
    cos, sin = rope.tables(torch.device("cpu")).cos_sin(torch.tensor([position]))
    angle = position * rope.inv_freq
    assert torch.allclose(cos[0].double(), angle.cos(), atol=5e-7)
    assert torch.allclose(sin[0].double(), angle.sin(), atol=5e-7)


@pytest.mark.parametrize("size, head_dim", [(64, 64), (32, 80), (16, 16)])
def test_there_and_back(size, head_dim):
    rope = a_rope(size, scaling=1.3)
    rope.cover(200_000, torch.device("cpu"))
    x = torch.randn(2, 3, 50, head_dim)
    positions = torch.randint(0, 200_000, (2, 1, 50), dtype=torch.int32)
    rotated = rope.rotate(x, positions)
    assert torch.allclose(rope.unrotate(rotated, positions), x, atol=1e-5)
    # a rotation and a scaling keep the norm of what they touch, and leave the rest alone
    norms = [t[..., :size].norm(dim=-1) for t in (rotated / 1.3, x)]
    assert torch.allclose(*norms, rtol=1e-5)
    assert torch.equal(rotated[..., size:], x[..., size:])
    # pure tables and a scaled query give the model's scores
    q = torch.randn(2, 3, 50, head_dim)
    cos, sin = rope.tables(torch.device("cpu")).cos_sin(positions)
    assert torch.allclose((rope.scale_query(q) * rotate(x, cos, sin)).sum(-1), (q * rotated).sum(-1), atol=1e-4)


def test_tables_grow_and_stay():
    rope = a_rope()
    device = torch.device("cpu")
    rope.cover(10, device)
    first = rope.tables(device)
    assert first.limit >= 4096
    rope.cover(first.limit, device)
    assert rope.tables(device) is first
    rope.cover(first.limit + 1, device)
    grown = rope.tables(device)
    assert grown.limit == 2 * first.limit
    assert torch.equal(grown.coarse[:, : first.coarse.shape[1]], first.coarse)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_parameters_are_those_of_the_model(arch):
    """Keys that the model's own code rotated, taken back."""
    model = tiny_model(arch)
    rotary, positions = model.model.rotary_emb, torch.tensor([[0, 3, 500, 3999]])
    for attention in attentions(model).values():
        module = attention.module
        rope = rope_of(module, attention.head_dim)
        rope.cover(4000, torch.device("cpu"))
        layer_type = module.config.layer_types[module.layer_idx] if arch == "gemma3" else None
        x = torch.randn(1, 2, 4, attention.head_dim)
        cos, sin = rotary(x, positions, *([layer_type] if layer_type else []))
        apply = __import__("sys").modules[type(module).__module__].apply_rotary_pos_emb
        theirs = apply(x, x, cos, sin)[1]
        assert torch.allclose(rope.rotate(x, positions.unsqueeze(1)), theirs, atol=2e-4)


def test_halves_are_pairs():
    cos, sin = torch.zeros(1), torch.ones(1)
    assert torch.equal(rotate(torch.tensor([1.0, 2.0, 5.0]), cos, sin), torch.tensor([-2.0, 1.0, 5.0]))
