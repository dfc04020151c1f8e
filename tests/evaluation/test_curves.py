"""Removal against damage of several methods side by side."""

import pytest
from tiny_edits import silencing
from tiny_words import ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.evaluation import curves, measures

ABOUT = ["the dog ran under the dog", "a cat sat on the dog and the dog ate", "then the dog saw a dog under a tree"]
FREE = ["the bird sat on the mat", "a small fish ate and it was big", "it ran under the tree and then it sat"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(13)


@pytest.fixture(scope="module")
def known(model):
    return measures.reference(
        model, tiny_tokenizer(), ids("dog"), concept_texts=ABOUT, other_texts=FREE, prompts=["it was", "the big"]
    )


@pytest.fixture(scope="module")
def edits(model):
    return {"own": silencing(model, "dog"), "other": silencing(model, "dog", "cat"), "nothing": Edit("nothing", ())}


def test_the_strengths_up_to_a_tenth_and_the_chosen_one_are_points(model, known, edits):
    told = []
    drawn = curves.draw(model, known, edits, [4.0, 1.0, -2.0], 3.0, lambda *step: told.append(step))
    assert list(drawn) == ["own", "other", "nothing"]
    assert drawn["nothing"] == []
    for method in ("own", "other"):
        assert [point["strength"] for point in drawn[method]] == [1.0, 2.0, 3.0, 4.0]
    for point in drawn["own"]:
        with applied(model, edits["own"].at(point["strength"])):
            found = measures.curve_point(model, known, point["strength"])
        assert point["mass"] == found.mass.plain()
        assert point["collateral_kl"] == found.collateral_kl.plain()
        assert point["first_token_kl"] == found.first_token_kl.plain()
    assert told[-1] == ("curves", 3, 3)


def test_a_curve_ends_where_a_tenth_is_left_and_the_own_one_goes_to_its_strength(model, known, edits):
    strengths = [1.0, 2.0, 4.0, 8.0, 16.0]
    drawn = curves.draw(model, known, edits, strengths, 12.0)
    whole = measures.removal_curve(
        model, known, strengths, lambda strength: applied(model, edits["other"].at(strength))
    )
    reached = next(number for number, point in enumerate(whole) if point.mass.value <= 0.1)
    assert [point["strength"] for point in drawn["other"]] == strengths[: reached + 1]
    assert [point["strength"] for point in drawn["own"]] == [1.0, 2.0, 4.0, 8.0, 12.0]
    crossing = measures.at_matched_removal(whole)
    assert curves.matched_table(drawn, "own")["rows"][1]["collateral_kl"] == pytest.approx(crossing.damage, rel=1e-6)


def test_a_sparse_curve_finds_the_same_damage_at_a_tenth_from_fewer_points(model, known, edits):
    strengths = [1.0, 2.0, 4.0, 8.0, 16.0]
    whole, sparse = (curves.draw(model, known, edits, strengths, 12.0, sparse=sparse) for sparse in (False, True))
    assert curves.matched_table(sparse, "own") == curves.matched_table(whole, "own")
    assert [point["strength"] for point in sparse["own"]] == [2.0, 4.0, 12.0]
    for method in ("own", "other"):
        assert 2 <= len(sparse[method]) < len(whole[method])
        assert all(point in whole[method] for point in sparse[method])
    weak = curves.draw(model, known, edits, [0.1, 0.2], 0.3, sparse=True)
    assert [point["strength"] for point in weak["own"]] == [0.3]
    assert curves.matched_table(weak, "own")["rows"][0]["strength"] is None


def test_a_chosen_strength_below_nothing_turns_the_curve_round(model, known, edits):
    drawn = curves.draw(model, known, {"own": edits["own"]}, [1.0, 2.0], -2.0)["own"]
    assert [point["strength"] for point in drawn] == [-1.0, -2.0]
    assert 1 < drawn[0]["mass"]["value"] < drawn[1]["mass"]["value"]


def test_methods_are_compared_where_a_tenth_is_left(model, known, edits):
    drawn = curves.draw(model, known, edits, [1.0, 2.0, 4.0], 8.0)
    table = curves.matched_table(drawn, "own")
    assert table["target"] == curves.MATCHED_TARGET == 0.1
    own, other, nothing = table["rows"]
    assert [row["method"] for row in table["rows"]] == list(drawn)
    assert own["ratio"] == 1
    assert 2 < own["strength"] < 8
    assert other["ratio"] == pytest.approx(other["collateral_kl"] / own["collateral_kl"])
    with applied(model, edits["own"].at(own["strength"])):
        found = measures.curve_point(model, known, own["strength"])
    assert found.mass.value == pytest.approx(0.1, rel=0.2)
    assert own["collateral_kl"] == pytest.approx(found.collateral_kl.value, rel=0.2)
    assert nothing == {"method": "nothing", "strength": None, "collateral_kl": None, "ratio": None}


def test_where_the_own_method_removes_too_little_there_is_no_ratio(model, known, edits):
    drawn = curves.draw(model, known, {"own": edits["own"]}, [0.1, 0.2], 0.3)
    drawn["other"] = curves.draw(model, known, {"other": edits["own"]}, [1.0, 2.0, 4.0], 8.0)["other"]
    own, other = curves.matched_table(drawn, "own")["rows"]
    assert own["strength"] is None
    assert other["strength"] is not None
    assert other["ratio"] is None
    assert curves.matched_table({"own": drawn["own"][:1]}, "own")["rows"][0]["strength"] is None
