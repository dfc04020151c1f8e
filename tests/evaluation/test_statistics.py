"""The statistics against scipy, hand-made examples and properties that must hold for all inputs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rotate_edit.evaluation import statistics as ours

shares = st.floats(0, 1)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_wilson_equals_scipy():
    for n in (1, 7, 50, 1000):
        for successes in {0, 1, n // 3, n - 1, n}:
            interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
            measured = ours.wilson(successes, n)
            assert measured.low == pytest.approx(interval.low, abs=1e-12)
            assert measured.high == pytest.approx(interval.high, abs=1e-12)
            assert measured.value == successes / n
            assert measured.n == n


def test_mcnemar_equals_the_exact_binomial_test():
    generator = np.random.default_rng(1)
    for n in (5, 40, 3000):
        base, edited = generator.random(n) < 0.8, generator.random(n) < 0.6
        lost, gained = int((base & ~edited).sum()), int((~base & edited).sum())
        expected = stats.binomtest(min(lost, gained), lost + gained).pvalue
        assert ours.mcnemar_exact(base, edited) == pytest.approx(expected, rel=1e-10)


def test_mcnemar_by_hand():
    # Six items lost, none gained: p = 2 / 2^6. Nothing changed: p = 1.
    assert ours.mcnemar_exact([1] * 6 + [0, 1], [0] * 6 + [0, 1]) == 2 / 64
    assert ours.mcnemar_exact([1, 0, 1], [1, 0, 1]) == 1.0


def test_bootstrap_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(2).exponential(size=120)
    measured = ours.mean(values)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", random_state=np.random.default_rng(3)
    )
    # Two independent sets of 10,000 draws: the quantiles themselves have a standard error near 2 % of this.
    assert measured.low == pytest.approx(reference.confidence_interval.low, abs=0.15 * measured.standard_error)
    assert measured.high == pytest.approx(reference.confidence_interval.high, abs=0.15 * measured.standard_error)
    assert measured.standard_error == pytest.approx(reference.standard_error, rel=0.05)
    assert measured.standard_error == pytest.approx(values.std() / math.sqrt(len(values)), rel=0.05)


def test_counting_equal_rows_is_the_same_distribution_as_drawing_items():
    base = np.array([1.0] * 45 + [0.0] * 15)
    counted = ours.resampled_means(base, draws=20_000)[:, 0]
    drawn = ours.resampled_means(base + np.arange(60) * 1e-9, draws=20_000)[:, 0]
    assert counted.mean() == pytest.approx(drawn.mean(), abs=3e-3)
    assert counted.std() == pytest.approx(drawn.std(), rel=0.03)
    assert stats.ks_2samp(np.round(counted * 60), np.round(drawn * 60)).pvalue > 1e-3


def test_intervals_hold_their_level():
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        measured = ours.mean(generator.normal(0.3, 1.0, 80), draws=800, seed=trial)
        covered += measured.low <= 0.3 <= measured.high
    assert 180 <= covered <= 199


def test_same_seed_same_interval_and_other_seed_another():
    values = np.random.default_rng(5).random(70)
    assert ours.mean(values, seed=1) == ours.mean(values, seed=1)
    assert ours.mean(values, seed=1) != ours.mean(values, seed=2)


def test_efficacy_specificity_and_harmonic_by_hand():
    # Base 18 of 20, edited 8 of 20, chance 1/4: kept = 0.15 / 0.65.
    base, edited = [1] * 18 + [0] * 2, [1] * 8 + [0] * 12
    concept = ours.kept_accuracy(base, edited, 0.25)
    assert concept.value == pytest.approx(0.15 / 0.65)
    removal = ours.efficacy(concept)
    assert removal.value == pytest.approx(0.5 / 0.65)
    cloze = ours.kept_probability([0.5, 0.3], [0.4, 0.32])
    assert cloze.value == pytest.approx(0.72 / 0.8)
    text = ours.kept_perplexity([-20.0, -10.0], [-23.0, -12.0], [10, 15])
    assert text.value == pytest.approx(math.exp(-5 / 25))
    general = (0.9 + math.exp(-0.2)) / 2
    neighbour = ours.kept_accuracy([1] * 10, [1] * 9 + [0], 0.25)
    kept = ours.specificity([cloze, text], [neighbour])
    near = 0.65 / 0.75
    assert kept.value == pytest.approx(2 * general * near / (general + near))
    both = ours.harmonic(removal, kept)
    assert both.value == pytest.approx(2 / (1 / removal.value + 1 / kept.value))
    assert ours.measure(both).low < both.value < ours.measure(both).high


def test_ember_overall_by_its_stated_formulas():
    # frac = clip((acc - .25) / (base - .25), 0, 1); efficacy = 1 - qa; specificity = HM(mmlu, similar domain).
    qa, similar, mmlu = ((0.90, 0.38), (0.80, 0.74), (0.60, 0.58))
    fraction = [min(1, max(0, (after - 0.25) / (before - 0.25))) for before, after in (qa, similar, mmlu)]

    def items(share):
        return [1] * round(50 * share) + [0] * (50 - round(50 * share))

    kept = [ours.kept_accuracy(items(before), items(after), 0.25) for before, after in (qa, similar, mmlu)]
    assert [one.value for one in kept] == pytest.approx(fraction)
    expected = 2 / (1 / fraction[1] + 1 / fraction[2])
    assert ours.specificity([kept[2]], [kept[1]]).value == pytest.approx(expected)
    overall = ours.harmonic(ours.efficacy(kept[0]), ours.specificity([kept[2]], [kept[1]]))
    assert overall.value == pytest.approx(2 / (1 / (1 - fraction[0]) + 1 / expected))


def test_harmonic_is_zero_as_soon_as_one_is():
    nothing = ours.Estimate(0.0, np.zeros(10), 5)
    most = ours.Estimate(0.9, np.full(10, 0.9), 5)
    assert ours.harmonic(nothing, most).value == 0
    assert (ours.harmonic(nothing, most).draws == 0).all()
    assert ours.harmonic(most, most).value == pytest.approx(0.9)


def test_specificity_without_neighbours_is_the_general_mean():
    one = ours.kept_probability([0.5], [0.25])
    assert ours.specificity([one], []).value == pytest.approx(0.5)


def test_base_at_chance_cannot_be_used():
    assert not ours.above_chance(15, 50, 0.25)
    assert not ours.above_chance(0, 0, 0.25)
    assert ours.above_chance(25, 50, 0.25)
    at_chance = ours.measure(ours.kept_accuracy([1, 0, 0, 0], [1, 0, 0, 0], 0.25))
    assert math.isnan(at_chance.value)
    assert at_chance.plain()["value"] is None


@given(pairs, shares.filter(lambda share: share < 0.95))
@settings(max_examples=60, deadline=None)
def test_fractions_kept_stay_between_nothing_and_everything(items, chance):
    base, edited = [first for first, _ in items], [second for _, second in items]
    kept = ours.kept_accuracy(base, edited, chance, draws=50)
    finite = kept.draws[np.isfinite(kept.draws)]
    assert ((finite >= 0) & (finite <= 1)).all()
    assert math.isnan(kept.value) == (np.mean(base) <= chance)
    same = ours.kept_accuracy(base, base, chance, draws=50)
    assert math.isnan(same.value) or same.value == 1


@given(pairs, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_items_does_not_matter(items, random):
    shuffled = random.sample(items, len(items))
    first = ours.paired_accuracy(*zip(*items), draws=200)
    second = ours.paired_accuracy(*zip(*shuffled), draws=200)
    assert first.p == second.p
    assert first.measure.low == second.measure.low
    swapped = ours.mcnemar_exact([b for _, b in items], [a for a, _ in items])
    assert swapped == first.p


def test_paired_bootstrap_sees_a_shift_that_unpaired_noise_would_hide():
    base = np.random.default_rng(6).normal(0, 5, 100)
    shifted = ours.paired_bootstrap(base, base - 0.1)
    assert shifted.measure.value == pytest.approx(-0.1)
    assert shifted.measure.high < 0
    assert shifted.p < 0.001
    assert shifted.measure.baseline == pytest.approx(base.mean())
    assert ours.paired_bootstrap(base, base).p == 1.0


def test_paired_log_ratio_is_the_geometric_mean():
    base = np.array([0.1, 0.2, 0.4, 0.8])
    ratio = ours.paired_log_ratio(base, base * np.array([0.5, 2.0, 0.25, 0.25]))
    assert ratio.measure.value == pytest.approx((0.5 * 2 * 0.25 * 0.25) ** 0.25)
    with pytest.raises(ValueError, match="positive"):
        ours.paired_log_ratio([0.0], [1.0])


def test_holm_equals_its_definition():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, made monotone.
    assert ours.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert ours.holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(ours.holm([0.5, math.nan, 0.9])[1])
    assert ours.holm([]) == []


@given(st.lists(shares, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values):
    adjusted = ours.holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_ratio_of_sums_weighs_texts_by_their_length():
    measured = ours.ratio_of_sums([1.0, 9.0], [10, 30])
    assert measured.value == pytest.approx(0.25)
    assert measured.low == pytest.approx(0.1)
    assert measured.high == pytest.approx(0.3)


def test_crossing_recovers_a_planted_exponential():
    # mass = exp(-s), damage = 0.001 exp(2 s): mass 0.1 at s = log 10, damage 0.1 there, whatever the grid.
    for strengths in ([0.5, 1, 2, 3, 4], [0.0, 2.0, 5.0], [1.0, 2.3, 2.31]):
        masses = np.exp(-np.array(strengths))
        damages = 0.001 * np.exp(2 * np.array(strengths))
        crossing = ours.matched_removal(strengths, masses, damages)
        assert crossing.strength == pytest.approx(math.log(10))
        assert crossing.damage == pytest.approx(0.1)


def test_crossing_takes_the_smallest_strength_and_knows_when_it_is_never_reached():
    # Down, up again, down again.
    assert ours.crossing_strength([1, 2, 3, 4], [0.5, 0.05, 0.5, 0.05]) < 2
    assert ours.crossing_strength([1, 2, 4], [0.9, 0.5, 0.11]) is None
    assert ours.matched_removal([], [], []) is None
    # The first point crosses: damage grows as the square of the strength from nothing.
    crossing = ours.matched_removal([2.0], [0.01], [0.4])
    assert crossing.strength == pytest.approx(1.0)
    assert crossing.damage == pytest.approx(0.1)
    with pytest.raises(ValueError, match="ascend"):
        ours.crossing_strength([2, 1], [0.5, 0.05])


def test_a_mass_of_exactly_nothing_is_crossed_not_an_error():
    assert 0 < ours.crossing_strength([1.0], [0.0]) < 1


def test_texts_and_plain_values():
    measured = ours.Measure(0.5, 0.4, 0.6, 100, 0.05).against(0.9)
    assert "0.5" in measured.text()
    assert "base 0.9" in measured.markdown()
    assert measured.plain() == {
        "value": 0.5, "low": 0.4, "high": 0.6, "standard_error": 0.05, "n": 100, "baseline": 0.9,
    }  # fmt: skip


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        ours.mcnemar_exact([1, 0], [1])


def test_one_resampling_says_what_many_do():
    generator = np.random.default_rng(3)
    base, weights = generator.random(120), generator.integers(5, 40, 120)
    edited = base * generator.random(120)
    pair = ours.paired_probabilities(base, edited)
    single = ours.paired_bootstrap(base, edited)
    assert pair.difference.measure.plain() == pytest.approx(single.measure.plain(), rel=1e-9)
    assert pair.difference.p == single.p
    assert pair.base.plain() == pytest.approx(ours.mean(base).plain(), rel=1e-12)
    assert pair.edited.plain() == pytest.approx(ours.mean(edited).plain(), rel=1e-12)
    assert np.array_equal(pair.kept.draws, ours.kept_probability(base, edited).draws)
    logs, other = -50 * base, -55 * base
    texts = ours.paired_perplexities(logs, other, weights)
    alone = ours.paired_perplexity(logs, other, weights)
    assert texts.difference.measure.plain() == pytest.approx(alone.measure.plain(), rel=1e-9)
    assert texts.difference.p == alone.p
    assert np.array_equal(texts.kept.draws, ours.kept_perplexity(logs, other, weights).draws)
    level = ours.ratio_of_sums(logs, weights)
    assert texts.base.low == pytest.approx(np.exp(-level.high), rel=1e-6)
    assert texts.base.high == pytest.approx(np.exp(-level.low), rel=1e-6)


def test_an_unchanged_model_differs_by_nothing_at_all():
    values = np.random.default_rng(0).random(90)
    pair = ours.paired_probabilities(values, values)
    assert (pair.difference.measure.value, pair.difference.measure.low, pair.difference.measure.high) == (0, 0, 0)
    assert pair.difference.p == 1
