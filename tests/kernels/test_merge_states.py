"""Merging partial attention: two parts take a path of their own."""

import torch

from hf_kvcache.kernels.merge_states import merge_states


def states():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2):
        out, lse = (torch.randn(2, 4, 3, *extra, generator=generator) for extra in ((8,), ()))
        parts.append((out, 5 * lse))
    # one saw nothing, the other saw nothing, neither did
    for part, rows in ((0, (0, 0)), (1, (0, 1)), (0, (1, 0)), (1, (1, 0))):
        parts[part][0][rows] = 0
        parts[part][1][rows] = -torch.inf
    return parts


def test_two_parts_are_merged_as_three_of_which_one_is_empty():
    two = states()
    empty = torch.zeros_like(two[0][0]), torch.full_like(two[0][1], -torch.inf)
    (out, lse), (expected, expected_lse) = merge_states(two), merge_states([*two, empty])
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-6)
    assert not out[1, 0].any() and lse[1, 0].eq(-torch.inf).all()


def test_nan_is_not_hidden():
    two = states()
    two[1][0][1, 2], two[1][1][1, 2] = torch.nan, torch.nan
    assert merge_states(two)[0][1, 2].isnan().all()
