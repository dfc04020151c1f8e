"""The generator: the same seed writes the same text, and its -log probability is what it claims."""

import math
import re
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotate_edit.models.demo import templates
from rotate_edit.models.demo.corpus import FAMILY_SHARES, Chooser, Writer, document, documents, withheld_form
from rotate_edit.models.demo.world import concepts, verb_forms

CHECKSUM = 848880199


@pytest.fixture(scope="module")
def sample():
    return list(documents("sample", 4_000))


def test_the_same_seed_writes_the_same_texts():
    first = [document.text for document in documents("training", 200)]
    assert first == [document.text for document in documents("training", 200)]
    # A change here means that the bundled model can no longer be trained again from this corpus.
    assert zlib.crc32("\n".join(first).encode()) == CHECKSUM


def test_another_seed_writes_other_texts():
    assert {d.text for d in documents("a", 200)}.isdisjoint(d.text for d in documents("b", 200))


def test_the_sample_has_enough_word_types(sample):
    types = {word.lower() for document in sample for word in re.findall("[A-Za-z]+", document.text)}
    assert len(types) >= 2_500


def test_no_slot_is_left_and_sentences_are_well_formed(sample):
    for found in sample:
        assert "{" not in found.text, found.text
        assert "}" not in found.text, found.text
        assert "  " not in found.text
        assert found.text[0] in '"ABCDEFGHIJKLMNOPQRSTUVWXYZ'
        assert found.text[-1] in '."'
        assert re.search(r"\ba [aeiou]", found.text) is None, found.text


def test_documents_are_about_what_they_say(sample):
    for found in sample:
        for name in found.concepts:
            forms = {form.lower() for form in concepts()[name].forms}
            assert forms & set(re.findall("[a-z]+", found.text.lower())), found


def test_families_have_their_shares(sample):
    for family, share in FAMILY_SHARES.items():
        observed = sum(found.family == family for found in sample) / len(sample)
        assert abs(observed - share) < 5 * math.sqrt(share * (1 - share) / len(sample))


def test_plurals_and_tenses_occur(sample):
    words = {word for document in sample for word in re.findall("[A-Za-z]+", document.text)}
    for name in ("dogs", "ships", "farm"):
        concept = concepts()[name]
        assert words & set(concept.plurals.values())
        verbs = [verb_forms(verb) for verb in concept.verbs]
        assert words & {forms["past"] for forms in verbs}
        assert words & {forms["base"] for forms in verbs}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_nats_add_up_over_choices(counts):
    chooser = Chooser("any")
    for count in counts:
        assert 0 <= chooser.index(count) < count
    assert chooser.nats == pytest.approx(sum(math.log(count) for count in counts), abs=1e-12)


@settings(max_examples=20)
@given(st.floats(0.05, 0.95))
def test_chance_and_weighted_have_their_probability_and_nats(probability):
    chooser = Chooser("chance")
    hits = sum(chooser.chance(probability) for _ in range(2_000))
    expected = -hits * math.log(probability) - (2_000 - hits) * math.log(1 - probability)
    assert chooser.nats == pytest.approx(expected, rel=1e-9)
    assert abs(hits / 2_000 - probability) < 0.06
    before = chooser.nats
    name = chooser.weighted({"one": probability, "other": 1 - probability})
    share = probability if name == "one" else 1 - probability
    assert chooser.nats - before == pytest.approx(-math.log(share), rel=1e-9)


def test_document_nats_are_positive_and_differ_with_length(sample):
    assert all(document.nats > 10 for document in sample)


def test_a_withheld_form_never_tells_its_fact():
    concept = concepts()["dogs"]
    withheld = set()
    for relation in range(len(concept.relations)):
        for member in range(len(concept.members)):
            form = templates.REVERSED[withheld_form(concept, relation, member)]
            if "{N}" not in form:
                sentence = Writer(Chooser("w")).fact(form, concept, member, relation, relation)
                withheld.add(sentence.split(". ")[-1])
    assert len(withheld) > 20
    text = " ".join(d.text for d in documents("training", 8_000) if "dogs" in d.concepts)
    assert not [sentence for sentence in withheld if sentence in text]


def test_document_is_independent_of_the_ones_before():
    assert document("training", 7) == list(documents("training", 8))[7]
