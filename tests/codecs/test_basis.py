"""Bases: the identity they rest on, prefixes, mixing, metrics."""

import pytest
import torch

from hf_kvcache.codecs.basis import Basis, by_group
from hf_kvcache.codecs.fitting import Moments, principal
from hf_kvcache.codecs.rotation import mixing


def moments_of(rows):
    moments = Moments(rows.shape[0], rows.shape[2])
    for part in rows.split(100, 1):
        moments.add(part)
    return moments


def correlated(n_groups=2, n_rows=700, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_groups, width, width, generator=generator, dtype=torch.float64)
    mix = mix * torch.logspace(0, -2, width, dtype=torch.float64).unsqueeze(0).unsqueeze(2)
    return torch.randn(n_groups, n_rows, width, generator=generator, dtype=torch.float64) @ mix + 0.5


@pytest.mark.parametrize("rank", [1, 4, 12, 24])
def test_principal_directions_are_the_whitened_svd_of_the_weights(rank):
    """Palu's decomposition: SVD of W S, S the Cholesky factor of the inputs' Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    width, hidden, n = 24, 40, 500
    weight = torch.randn(width, hidden, generator=generator, dtype=torch.float64)
    inputs = torch.randn(n, hidden, generator=generator, dtype=torch.float64) @ torch.randn(
        hidden, hidden, generator=generator, dtype=torch.float64
    )
    factor = torch.linalg.cholesky(inputs.T @ inputs)
    u, s, vt = torch.linalg.svd(weight @ factor, full_matrices=False)
    whitened = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(factor)

    basis, _ = principal(moments_of((inputs @ weight.T).unsqueeze(0)).covariance(False), 1)
    basis = basis.truncated(rank)
    ours = (basis.down[0].double() @ basis.up[0, 0].double()).T @ weight
    assert (ours - whitened).norm() / whitened.norm() < 1e-6


def test_what_is_lost_is_what_the_directions_save():
    rows = correlated()
    moments = moments_of(rows)
    for centred in (False, True):
        basis, saves = principal(moments.covariance(centred), 1, moments.mean if centred else None)
        x = rows.unsqueeze(0)
        for rank in (3, 10, 24):
            placed = basis.placed(rank, False, torch.float64, "cpu")
            lost = (placed.decode(placed.encode(x)) - x).square().sum(-1).mean((0, 2))
            # the basis is kept in float32
            assert torch.allclose(lost, saves[:, rank:].sum(1), rtol=1e-3, atol=1e-6 * saves.sum())


def test_the_mean_makes_room_for_a_direction():
    rows = correlated() + 30
    moments = moments_of(rows)
    x = rows.unsqueeze(0)

    def lost(centred):
        basis, _ = principal(moments.covariance(centred), 1, moments.mean if centred else None)
        placed = basis.placed(6, False, torch.float64, "cpu")
        return (placed.decode(placed.encode(x)) - x).square().sum()

    assert lost(True) < lost(False)


def test_a_metric_moves_the_error_to_where_it_does_not_matter():
    rows = correlated()
    moments = moments_of(rows)
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(2, 300, 24, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, 24)
    metric = gradients.transpose(1, 2) @ gradients / 300
    x = rows.unsqueeze(0)

    def loss(metric_used):
        basis, saves = principal(moments.covariance(False), 1, None, metric_used)
        placed = basis.placed(8, False, torch.float64, "cpu")
        error = (placed.decode(placed.encode(x)) - x)[0]
        return torch.einsum("gni,gij,gnj->", error, metric, error) / rows.shape[1], saves[:, 8:].sum()

    weighted, promised = loss(metric)
    assert torch.allclose(weighted, promised, rtol=1e-3)
    assert weighted < 0.9 * loss(None)[0]


def test_a_smaller_rank_is_a_prefix():
    basis, _ = principal(moments_of(correlated()).covariance(False), 1)
    placed, small = (basis.placed(rank, False, torch.float32, "cpu") for rank in (20, 7))
    assert torch.equal(placed.down[..., :7], small.down)
    assert torch.equal(placed.up[:, :, :7], small.up)
    with pytest.raises(ValueError, match="has no 25 directions"):
        basis.truncated(25)


@pytest.mark.parametrize("size", [1, 2, 16, 24, 33, 80, 128])
def test_mixing_is_orthogonal_and_flat(size):
    q = mixing(size, torch.device("cpu")).double()
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-5)
    assert q.abs().max() <= (2 / size) ** 0.5 + 1e-6


def test_mixing_shares_out_energy_and_changes_no_row():
    basis, _ = principal(moments_of(correlated()).covariance(False), 1)
    x = correlated().unsqueeze(0)
    plain, mixed = (basis.placed(12, is_mixed, torch.float64, "cpu") for is_mixed in (False, True))
    assert torch.allclose(plain.decode(plain.encode(x)), mixed.decode(mixed.encode(x)), atol=1e-4)

    def unevenness(latents):
        deviation = latents.std(2)
        return (deviation.amax(-1) / deviation.amin(-1)).mean()

    assert unevenness(mixed.encode(x)) < 0.5 * unevenness(plain.encode(x))


def test_groups_are_neighbouring_heads():
    x = torch.randn(2, 6, 5, 4)
    grouped = by_group(x, 3)
    assert grouped.shape == (2, 2, 5, 12)
    assert torch.equal(grouped[:, 1, :, 4:8], x[:, 4])
    basis = Basis(
        torch.eye(12).expand(2, 12, 12), torch.eye(12).unflatten(1, (3, 4)).transpose(0, 1).expand(2, 3, 12, 4)
    )
    assert torch.equal(basis.decode(basis.encode(grouped)), x)


def test_placed_copies_keep_no_larger_storage_alive():
    basis, _ = principal(moments_of(correlated()).covariance(False), 1)
    placed = basis.placed(4, False, torch.float32, "cpu")
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in placed.tensors.values())
    assert basis.placed(4, False, torch.float32, "cpu") is placed
