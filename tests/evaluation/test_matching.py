"""Damage at matched removal over documents: planted curves, the same answer as without documents, paired draws."""

import math

import numpy as np
import pytest

from rotate_edit.evaluation.matching import document_weights, log_damage_at, pooled_ratio
from rotate_edit.evaluation.statistics import matched_removal

STRENGTHS = np.array([1.0, 2.0, 4.0])


def planted(documents=40, cost=0.01, seed=0):
    """Documents of different length whose mass is exp(-strength) and whose damage is cost * exp(strength)."""
    generator = np.random.default_rng(seed)
    base, counts = generator.uniform(1, 3, documents), generator.integers(50, 80, documents).astype(float)
    masses = np.exp(-STRENGTHS)[:, None] * base
    damages = cost * np.exp(STRENGTHS)[:, None] * counts
    return masses, base, damages, counts


def test_first_row_of_the_weights_is_the_data():
    weights = document_weights(7, draws=50)
    assert weights.shape == (51, 7)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all()


def test_log_linear_curves_are_crossed_exactly():
    masses, base, damages, counts = planted()
    found = log_damage_at(masses, base, damages, counts, document_weights(40, draws=100), target=0.05)
    # Mass exp(-s) is 0.05 at s = ln 20, where the damage is 0.01 * 20, whatever documents are drawn.
    assert np.allclose(found, math.log(0.2), atol=1e-12)


def test_a_target_beyond_the_strengths_is_extrapolated():
    masses, base, damages, counts = planted()
    found = log_damage_at(masses, base, damages, counts, document_weights(40, draws=3), target=0.001)
    assert np.allclose(found, math.log(10), atol=1e-12)


def test_equals_matched_removal_on_uneven_curves():
    generator = np.random.default_rng(1)
    base, counts = generator.uniform(1, 3, 12), np.full(12, 64.0)
    masses = np.sort(generator.uniform(0.01, 1, (3, 12)), axis=0)[::-1] * np.array([1.0, 0.4, 0.02])[:, None]
    damages = np.sort(generator.uniform(0.1, 9, (3, 12)), axis=0)
    own = log_damage_at(masses, base, damages, counts, document_weights(12, draws=1))[0]
    fractions, means = masses.sum(axis=1) / base.sum(), damages.sum(axis=1) / counts.sum()
    other = matched_removal(STRENGTHS, fractions, means)
    assert own == pytest.approx(math.log(other.damage), abs=1e-12)


def test_pooled_ratio_of_noisy_documents_covers_the_planted_one():
    weights = document_weights(60, draws=2000)
    generator = np.random.default_rng(2)
    ratios = []
    for concept in range(5):
        masses, base, damages, counts = planted(60, seed=concept)
        noise = generator.lognormal(0, 0.3, 60)
        cheap = log_damage_at(masses, base, damages * noise, counts, weights)
        dear = log_damage_at(masses, base, 2 * damages * generator.lognormal(0, 0.3, 60), counts, weights)
        ratios.append(dear - cheap)
    found = pooled_ratio(ratios)
    assert found.measure.low < 2 < found.measure.high
    assert found.measure.low > 1.5
    assert found.p < 0.01
    assert found.measure.n == 5


def test_no_difference_is_not_significant():
    weights = document_weights(30, draws=500)
    masses, base, damages, counts = planted(30)
    same = log_damage_at(masses, base, damages, counts, weights)
    assert pooled_ratio([same - same]).p == 1.0


def test_one_strength_is_refused():
    with pytest.raises(ValueError, match="two strengths"):
        log_damage_at([[1.0]], [1.0], [[1.0]], [1.0], document_weights(1, draws=1))
