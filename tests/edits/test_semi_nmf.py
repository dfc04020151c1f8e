"""Semi-NMF finds planted parts, lowers the error at every step, and keeps its sparsity and signs."""

import torch

from rotate_edit.edits.semi_nmf import concept_score, semi_nmf


def planted(seed=0):
    """Three sparse features with both signs, and weights of which each position uses one or two."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(60, 3)
    for column in range(3):
        features[20 * column : 20 * column + 6, column] = torch.randn(6, generator=generator) + 2.0
        features[20 * column + 6 : 20 * column + 9, column] = -1.5
    weights = torch.rand(300, 3, generator=generator) * (torch.rand(300, 3, generator=generator) < 0.5)
    return features, weights, features @ weights.T


def test_planted_features_are_found():
    features, _, table = planted()
    found, used = semi_nmf(table, 3, sparsity=0.15, iterations=200)
    cosine = torch.nn.functional.normalize(features, dim=0).T @ torch.nn.functional.normalize(found, dim=0)
    assert cosine.abs().max(dim=1).values.min() > 0.99
    assert (used >= 0).all()
    assert ((table - found @ used.T).norm() / table.norm()) < 0.05


def test_more_iterations_never_hurt_and_features_stay_sparse():
    _, _, table = planted(1)
    noisy = table + 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(2))
    errors = []
    for iterations in (1, 10, 100):
        found, used = semi_nmf(noisy, 4, sparsity=0.15, iterations=iterations)
        assert (found != 0).sum(dim=0).max() <= 9
        errors.append(float((noisy - found @ used.T).norm()))
    assert errors[0] > errors[1] >= errors[2] * 0.999


def test_the_same_seed_gives_the_same_factors():
    _, _, table = planted()
    first, second = semi_nmf(table, 3, iterations=5), semi_nmf(table, 3, iterations=5)
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_the_score_tells_which_feature_is_the_concepts():
    weights = torch.tensor([[2.0, 1.0], [4.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    score = concept_score(weights, torch.tensor([True, True, False, False]))
    assert torch.allclose(score, torch.tensor([3.0, 1.0]).log(), atol=1e-5)
