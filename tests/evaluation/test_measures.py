"""Measures on a live model against references written out token by token."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.models import batches

FREE = ["a cat sat on the mat", "the bird saw the tree"]
TEXTS = [
    "the dog ran",
    "a cat sat on the mat and then it was a big dog",
    "bird",
    "the small fish ate the dog under a tree",
    "it was big and it was small and the bird saw the cat",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base():
    return tiny_model(0)


@pytest.fixture(scope="module")
def edited():
    model = tiny_model(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1 * torch.randn(16, 24, generator=torch.Generator())
    return model


@pytest.fixture(scope="module")
def other():
    return tiny_model(1)


@pytest.fixture(scope="module")
def divergence(base, other, tokenizer):
    """By text in the order of TEXTS, summed over its positions."""
    passages = tokenised(tokenizer)
    return measures.kl_by_text(other, passages, measures.every_position(base, passages))[0]


def tokenised(tokenizer, texts=TEXTS, **sizes):
    return batches.tokenise(tokenizer, texts, vocabulary_size=len(WORDS), **sizes)


def alone(model, tokenizer, text):
    """Log-probabilities of one text run by itself, in double precision: float64 [length, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double()
    return torch.log_softmax(logits, dim=-1)


def test_first_token_kl_equals_a_ten_line_reference(base, edited, tokenizer):
    prompts = tokenised(tokenizer)
    measured = measures.first_token_kl(edited, prompts, measures.last_position(base, prompts))
    total = 0.0
    for text in TEXTS:
        before, after = alone(base, tokenizer, text)[-1], alone(edited, tokenizer, text)[-1]
        total += sum(p.exp() * (p - q) for p, q in zip(before, after)).item()
    assert measured.value == pytest.approx(total / len(TEXTS), rel=1e-5)
    assert measured.n == len(TEXTS)
    assert measured.low <= measured.value <= measured.high


def test_collateral_kl_is_the_mean_over_all_real_positions(base, edited, tokenizer):
    passages = tokenised(tokenizer)
    measured = measures.collateral_kl(edited, passages, measures.every_position(base, passages))
    divergences = [
        (before.exp() * (before - after)).sum().item()
        for text in TEXTS
        for before, after in zip(alone(base, tokenizer, text), alone(edited, tokenizer, text))
    ]
    assert passages.tokens() == len(divergences)
    assert measured.value == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)


def test_an_unchanged_model_has_no_damage_at_all(base, tokenizer):
    passages = tokenised(tokenizer)
    assert measures.collateral_kl(base, passages, measures.every_position(base, passages)).value == 0
    assert measures.first_token_kl(base, passages, measures.last_position(base, passages)).high == 0


def test_concept_mass_counts_only_where_the_text_has_the_concept(base, edited, tokenizer):
    passages = tokenised(tokenizer)
    concept = ids("dog", "cat")
    sums, counts = measures.mass_by_text(edited, passages, concept)
    for index, text in enumerate(TEXTS):
        words = text.split()
        values = alone(edited, tokenizer, text).exp()
        places = [place for place in range(1, len(words)) if words[place] in ("dog", "cat")]
        assert counts[index] == len(places)
        expected = sum(values[place - 1][concept].sum().item() for place in places)
        assert sums[index] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    known = measures.mass_by_text(base, passages, concept)
    measured = measures.concept_mass(edited, passages, concept, known)
    assert measured.value == pytest.approx(float(sums.sum() / counts.sum()))
    assert measured.baseline == pytest.approx(float(known[0].sum() / known[1].sum()))


def test_padding_is_never_taken_for_a_concept_token(base, tokenizer):
    # Id 0 fills the short rows; as a "concept" it must not be found in them.
    _, counts = measures.mass_by_text(base, tokenised(tokenizer), torch.tensor([0]))
    assert counts.sum() == 0


def test_damage_is_both_measures_in_one_pass(base, edited, tokenizer):
    passages = tokenised(tokenizer)
    known = measures.every_position(base, passages)
    both = measures.damage_by_text(edited, passages, known)
    apart = [*measures.kl_by_text(edited, passages, known), *measures.log_likelihood_by_text(edited, passages)]
    assert all(torch.equal(one, other) for one, other in zip(both, apart, strict=True))


def test_perplexity_equals_the_sum_over_single_texts(base, tokenizer):
    total, count = 0.0, 0
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        values = alone(base, tokenizer, text)
        total += sum(values[place, token].item() for place, token in enumerate(tokens[1:]))
        count += len(tokens) - 1
    measured = measures.perplexity(base, tokenised(tokenizer))
    assert measured.value == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_concept_probability_after_prompts(base, edited, tokenizer):
    prompts = tokenised(tokenizer)
    measured = measures.concept_probability(edited, prompts, ids("dog"), measures.last_position(base, prompts))
    expected = [alone(edited, tokenizer, text)[-1].exp()[ids("dog")].item() for text in TEXTS]
    assert measured.value == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert measured.baseline is not None


@given(order=st.permutations(range(len(TEXTS))), tokens=st.integers(8, 64))
@settings(max_examples=25, deadline=None)
def test_neither_the_order_of_texts_nor_the_batches_matter(base, other, tokenizer, divergence, order, tokens):
    passages = tokenised(tokenizer, [TEXTS[index] for index in order], tokens_at_once=tokens)
    sums, counts = measures.kl_by_text(other, passages, measures.every_position(base, passages))
    assert torch.allclose(sums, divergence[list(order)], rtol=1e-5)
    assert counts.tolist() == [len(TEXTS[index].split()) for index in order]


def test_a_curve_follows_the_strength_and_leaves_the_model_alone(base, tokenizer):
    weight = base.lm_head.weight
    untouched = weight.detach().clone()

    @contextmanager
    def quieter(strength):
        with torch.no_grad():
            saved = weight[ids("dog")].clone()
            weight[ids("dog")] -= strength * 2 * torch.ones(16) * saved.sign()
        yield
        with torch.no_grad():
            weight[ids("dog")] = saved

    known = measures.reference(
        base,
        tokenizer,
        ids("dog"),
        concept_texts=TEXTS,
        other_texts=FREE,
        prompts=["the", "a big"],
    )
    points = measures.removal_curve(base, known, [0.0, 0.5, 1.0], quieter)
    assert torch.equal(weight, untouched)
    assert points[0].mass.value == pytest.approx(1)
    assert points[0].collateral_kl.value == 0
    assert points[0].first_token_kl.value == 0
    assert points[1].collateral_kl.value > 0
    assert [point.strength for point in points] == [0.0, 0.5, 1.0]
    # Amplified, it is the texts without the concept that are looked at, by hand here.
    with quieter(-0.5), torch.no_grad():
        chances = [base(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits.softmax(-1) for text in FREE]
        louder = sum(float(chance[0, :, ids("dog")].sum()) for chance in chances)
    with torch.no_grad():
        chances = [base(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits.softmax(-1) for text in FREE]
    (raised,) = measures.removal_curve(base, known, [-0.5], quieter)
    assert raised.mass.value == pytest.approx(louder / sum(float(chance[0, :, ids("dog")].sum()) for chance in chances))
    assert measures.at_matched_removal(points, target=1e-30) is None


def test_concept_texts_without_the_concept_are_refused(base, tokenizer):
    with pytest.raises(BadInput, match="none of its tokens"):
        measures.reference(base, tokenizer, ids("fish"), concept_texts=["the dog ran"], other_texts=["a cat"])


def test_a_constant_added_to_the_concepts_logits_is_added_to_its_mean_log_odds(base, tokenizer):
    concept, passages = ids("dog", "cat"), tokenised(tokenizer, tokens_at_once=16)
    assert len(passages.batches) > 1
    logits = measures.every_position(base, passages)
    before = measures.mean_log_odds(logits, concept)
    alone_of = torch.cat([alone(base, tokenizer, text) for text in TEXTS]).exp()
    chances = alone_of[:, concept].sum(dim=1)
    assert before == pytest.approx(float((chances / (1 - chances)).log().mean()), rel=1e-5)
    for constant in (-7.0, -0.5, 1.25, 4.0):
        moved = []
        for values in logits:
            louder = values.double()
            louder[:, concept] += constant
            moved.append(torch.log_softmax(louder, dim=-1))
        assert measures.mean_log_odds(moved, concept) == pytest.approx(before + constant, abs=1e-6)


def test_log_odds_of_a_concept_that_is_certain_are_finite():
    certain = torch.log_softmax(torch.tensor([[0.0, 200.0, 0.0]]), dim=-1)
    assert measures.mean_log_odds([certain], torch.tensor([1])) > 20
    assert torch.isfinite(torch.tensor(measures.mean_log_odds([certain], torch.tensor([0, 1, 2]))))
