"""Merging partial attention: two parts take a path of their own; attention sinks are one more score."""

import pytest
import torch

from hf_kvcache.kernels.merge_states import merge_states, with_sink


def states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2):
        out, lse = (torch.randn(2, 4, 3, *extra, generator=generator, dtype=dtype) for extra in ((8,), ()))
        parts.append((out, 5 * lse))
    # one saw nothing, the other saw nothing, neither did
    for part, rows in ((0, (0, 0)), (1, (0, 1)), (0, (1, 0)), (1, (1, 0))):
        parts[part][0][rows] = 0
        parts[part][1][rows] = -torch.inf
    return parts


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"])
def test_two_parts_are_merged_as_three_of_which_one_is_empty(dtype, atol):
    two = states(dtype)
    empty = torch.zeros_like(two[0][0]), torch.full_like(two[0][1], -torch.inf)
    (out, lse), (expected, expected_lse) = merge_states(two), merge_states([*two, empty])
    assert out.dtype == lse.dtype == expected.dtype == expected_lse.dtype == dtype
    assert torch.allclose(out, expected, rtol=0, atol=atol)
    assert torch.allclose(lse, expected_lse, rtol=0, atol=10 * atol)
    assert not out[1, 0].any() and lse[1, 0].eq(-torch.inf).all()


@pytest.mark.parametrize("n_parts", [2, 3])
def test_one_float64_tensor_makes_the_arithmetic_float64(n_parts):
    """An op that sums in float32 beside one that does not: neither the order nor the number of parts matters."""
    first, second = states(torch.float64)
    rest = [(torch.zeros_like(first[0]), torch.full_like(first[1], -torch.inf))] * (n_parts - 2)
    expected = merge_states([first, second])
    narrow = first[0].float().double(), first[1].float().double()
    exact = merge_states([narrow, second])
    for mixed in ([(x.float() for x in first), second], [second, (x.float() for x in first)]):
        out, lse = merge_states([tuple(part) for part in mixed] + rest)
        assert lse.dtype == torch.float64
        assert torch.allclose(lse, exact[1], rtol=0, atol=1e-14)
        assert torch.allclose(out.double(), expected[0], rtol=0, atol=1e-6)


def test_nan_is_not_hidden():
    two = states()
    two[1][0][1, 2], two[1][1][1, 2] = torch.nan, torch.nan
    assert merge_states(two)[0][1, 2].isnan().all()


@pytest.mark.parametrize(
    "dtype, atol",
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3)],
    ids=["float64", "float32", "float16"],
)
def test_a_sink_is_one_more_key_without_a_value(dtype, atol):
    generator = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn(2, 4, 3, 37, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 4, 37, 8, generator=generator, dtype=torch.float64)
    sinks = torch.tensor([-2.0, 0.0, 1.5, 6.0], dtype=torch.float64)
    column = sinks.view(1, 4, 1, 1).expand(2, 4, 3, 1)
    expected = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ values
    compute = torch.promote_types(dtype, torch.float32)
    out, lse = with_sink((scores.softmax(-1) @ values).to(dtype), scores.logsumexp(-1).to(compute), sinks.to(dtype))
    assert out.dtype == dtype and lse.dtype == compute
    assert torch.allclose(out.double(), expected, rtol=0, atol=atol)
    assert torch.allclose(lse.double(), torch.cat([scores, column], -1).logsumexp(-1), rtol=0, atol=max(atol, 1e-14))


def test_where_nothing_was_seen_a_sink_leaves_zeros():
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 3, 2), -torch.inf)
    # also beside a sink that is switched off
    sinks = torch.tensor([0.5, -torch.inf, 1e30])
    out, lse = with_sink(out, lse, sinks)
    assert not out.isnan().any() and not out.any()
    assert torch.equal(lse, sinks.view(1, 3, 1).expand(1, 3, 2))


def test_a_sink_switched_off_changes_nothing():
    out, lse = states()[0]
    again, again_lse = with_sink(out, lse, torch.full((4,), -torch.inf))
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


def test_nan_under_a_sink_is_not_hidden():
    out, lse = states()[0]
    out[1, 2], lse[1, 2] = torch.nan, torch.nan
    assert with_sink(out, lse, torch.zeros(4))[0][1, 2].isnan().all()


@pytest.mark.parametrize("shape", [(1,), (8,), (1, 4)], ids=str)
def test_a_sink_for_every_head(shape):
    out, lse = states()[0]
    with pytest.raises(ValueError, match=r"sinks must be \[4\]"):
        with_sink(out, lse, torch.zeros(shape))
