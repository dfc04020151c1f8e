"""The search on the demo model: small, resumable, interrupted; every promise about its folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_session import session_of, words_of

from rotate_edit.edits.apply import applied
from rotate_edit.edits.key_moments import KeyMoments
from rotate_edit.edits.low_rank import LowRankFit
from rotate_edit.edits.strength import cross
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.items import divide
from rotate_edit.models.cost import size_of
from rotate_edit.recipe import Recipe, parse_recipe, read_recipe
from rotate_edit.search import trials, tune

TOKENS = 192
# A fit of words, small: what the model writes itself, their rank, and few steps.
FITTED = {"method": "silence-words", "self_text": 2000, "settings": {"rank": 8, "steps": 3}}


def recipe(**changes: Any) -> Recipe:
    small = {
        "model": "demo",
        "concepts": [words_of("dogs")],
        "locate": {"group_distance": 2.0, "candidates": 120},
        "decompose": {"channels": 1},
        "select": {"fdr": 0.3},
        "edit": {"method": "channel-located"},
        "evaluate": {"items": "demo", "limit": 3},
    }
    return parse_recipe(small | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("search") / "tune"
    tune.search(recipe(), output, trials=5, tokens=TOKENS)
    return output


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / tune.RECORD).read_text())


@pytest.fixture(scope="module")
def context() -> trials.SearchContext:
    return trials.prepare(session_of(recipe()), tokens=TOKENS)


@pytest.fixture(scope="module")
def fitted() -> trials.SearchContext:
    """A recipe of silence-words, whose one fit all trials share."""
    return trials.prepare(session_of(recipe(edit=FITTED)), tokens=TOKENS)


@pytest.fixture(scope="module")
def rank_one() -> trials.SearchContext:
    return trials.prepare(session_of(recipe(edit={"method": "rank-one", "self_text": 2000})), tokens=TOKENS)


def held(context: trials.SearchContext, kind: type) -> list[Any]:
    """What the trials share of one kind."""
    found = [value[-1] if isinstance(value, list) else value for value in context.shared.values()]
    return [value for value in found if isinstance(value, kind)]


def test_the_first_trials_are_the_recipes_own_settings(record: dict[str, Any]) -> None:
    own = recipe()
    for trial, target in zip(record["trials"], tune.OWN_TARGETS):
        assert trial["settings"]["select.share"] == own.select.share
        assert trial["settings"]["edit.direction"] == own.edit.direction
        assert trial["removal"] == pytest.approx(1 - target, abs=0.1 * target + 1e-6)
    assert len(record["trials"]) + len(record["failed"]) == 5


def test_the_front_is_not_beaten_and_the_choice_lies_on_it(record: dict[str, Any]) -> None:
    points = [(trial["removal"], trial["damage"]) for trial in record["trials"]]
    front = [points[place] for place in record["front"]]
    assert front == sorted(front)
    assert not any(r > fr and d < fd for r, d in points for fr, fd in front)
    assert 0 <= record["chosen"] < len(front)
    assert record["test"]["damage"] > 0
    assert record["test"]["own_damage"] > 0


def test_the_chosen_recipe_is_a_recipe_that_does_what_the_record_says(
    folder: Path, record: dict[str, Any], context: trials.SearchContext
) -> None:
    found = read_recipe(folder / tune.CHOSEN)
    chosen = record["trials"][record["front"][record["chosen"]]]
    assert found.concepts[0].strength == round(chosen["strengths"]["dogs"], 4)
    assert found.select.share == pytest.approx(chosen["settings"]["select.share"])
    again = trials.try_settings(context, chosen["settings"])
    assert again.removal == pytest.approx(chosen["removal"], abs=1e-4)
    assert again.damage == pytest.approx(chosen["damage"], rel=1e-3)
    assert (folder / tune.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_search_goes_on_where_it_was(folder: Path, record: dict[str, Any]) -> None:
    done: list[int] = []

    def report(step: str, number: int, total: int) -> None:
        done.extend([number] if step == "tune" else [])

    more = tune.search(recipe(), folder, trials=6, tokens=TOKENS, report=report)
    # One trial from five on, then all six; the others are those of before, to the second that they took.
    assert done == [5, 6]
    assert len(more["trials"]) + len(more["failed"]) == 6
    assert more["trials"][: len(record["trials"])] == record["trials"]


def test_picking_anew_tries_nothing_and_the_front_can_be_asked(folder: Path, record: dict[str, Any]) -> None:
    done = json.loads((folder / tune.RECORD).read_text())["trials"]
    again = tune.search(recipe(), folder, trials=2, tokens=TOKENS, pick="1", lm_eval=True)
    assert again["trials"] == done
    assert again["chosen"] == 0
    assert len(again["front_summaries"]) == len(again["front"])
    assert all(summary["efficacy"]["n"] > 0 for summary in again["front_summaries"])


def test_another_recipes_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds the search of another recipe"):
        tune.search(recipe(seed=3), folder, trials=6, tokens=TOKENS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty and holds no search"):
        tune.search(recipe(), tmp_path, trials=6, tokens=TOKENS)


def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    interrupts = [KeyboardInterrupt]

    def report(step: str, done: int, total: int) -> None:
        if step == "tune" and done == 2 and interrupts:
            raise interrupts.pop()

    record = tune.search(recipe(), tmp_path / "tune", trials=50, tokens=TOKENS, report=report)
    assert record["interrupted"]
    assert len(record["trials"]) == 2
    assert (tmp_path / "tune" / tune.CHOSEN).is_file()


def test_nothing_found_is_a_failure_and_no_texts_bad_input(tmp_path: Path, context: trials.SearchContext) -> None:
    with pytest.raises(Failure, match=r"found no neuron to change|no neuron is left"):
        trials.try_settings(context, {"select.fdr": 1e-9, "target": 0.1})
    with pytest.raises(BadInput, match="nothing to search but the strength"):
        tune.search(recipe(edit={"method": "token-logits"}), tmp_path / "none", trials=1)
    with pytest.raises(BadInput, match="tune needs texts"):
        tune.search(
            recipe(concepts=[{"name": "dogs", "words": ["dog"], "strength": 2}], evaluate={"written_texts": 0}),
            tmp_path / "t",
        )


def test_the_model_is_left_as_it_was_and_a_trial_writes_nothing(context: trials.SearchContext, tmp_path: Path) -> None:
    model = context.session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trials.try_settings(context, {"select.share": 0.3, "target": 0.2})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_layers_and_matrices_limit_the_edit(context: trials.SearchContext) -> None:
    edit = trials.built(context, {"locate.layers": [2, 3], "select.share": 0.2})
    assert {change.layer for change in edit.changes} <= {2, 3}
    assert len(edit.changes) < len(trials.built(context, {"select.share": 0.2}).changes)


def test_an_amplified_concept_is_raised(context: trials.SearchContext) -> None:
    edit = trials.built(context, {}).at(-2.0)
    removal, damage = trials.effect(context, edit, {"dogs": -2.0})
    assert 0 < removal < 1
    assert damage > 0
    with applied(context.session.model, edit):
        pass


@pytest.mark.parametrize("target", [0.5, 0.1, 0.02])
def test_trials_find_strengths_of_bent_curves(target: float) -> None:
    asked: list[float] = []

    def curve(strength: float) -> float:
        asked.append(strength)
        return math.exp(-0.1 * strength - 0.02 * strength**2)

    found = cross(curve, target, start=2.0, near=trials.NEAR_ENOUGH)
    assert curve(found.high) == pytest.approx(target, rel=0.1)
    assert found.at == curve(found.high)
    assert len(asked) <= 10


def test_a_target_that_no_strength_reaches_is_a_failure(context: trials.SearchContext) -> None:
    with pytest.raises(Failure, match="no strength up to 64"):
        trials.try_settings(context, {"target": 1e-12})


def test_the_recipe_against_itself_costs_the_same(context: trials.SearchContext) -> None:
    own = trials.try_settings(context, {"target": 0.15})
    found = trials.compared(context, own)
    assert found["removal"] == pytest.approx(own.removal, abs=1e-6)
    # Interpolated between two strengths, fifteen per cent to either side.
    assert found["own_damage"] == pytest.approx(found["damage"], rel=0.03)


@pytest.mark.parametrize("method", ["rank-one", "channel-located"])
def test_the_recipes_own_settings_are_among_those_tried_and_known_again(
    method: str, context: trials.SearchContext
) -> None:
    own = recipe(edit={"method": method, "direction": "mean"}, locate={"matrices": ["gate", "out"]})
    here = replace(context, session=replace(context.session, recipe=own))
    settings = tune.own_trial(here, 0.1)
    assert settings["edit.direction"] == "mean"
    assert settings["locate.matrices"] == "gate+out"
    assert here.session.with_settings(settings).recipe.locate.matrices == ["gate", "out"]
    assert here.session.with_settings(settings).method == here.session.method
    tried = trials.Trial(settings, {}, 0.9, 0.1, 0.1)
    assert tune._is_own(here, tried)
    assert not tune._is_own(here, replace(tried, settings=settings | {"edit.ridge": 7.0}))


def test_a_rank_one_recipe_is_tuned(tmp_path: Path) -> None:
    wanted = recipe(edit={"method": "rank-one", "self_text": 2000})
    record = tune.search(wanted, tmp_path / "tune", trials=4, tokens=TOKENS)
    own = wanted.edit.settings.get("key_ridge", 0.03)
    assert record["trials"][0]["settings"]["edit.settings.key_ridge"] == own
    assert record["trials"][0]["removal"] == pytest.approx(0.9, abs=0.011)
    assert {trial["settings"]["last layer"] for trial in record["trials"]} <= {3, 4}
    found = read_recipe(tmp_path / "tune" / tune.CHOSEN)
    assert found.edit.method == "rank-one"


def test_rank_one_trials_read_the_models_own_text_once(rank_one: trials.SearchContext) -> None:
    trials.built(rank_one, {"last layer": 3})
    trials.built(rank_one, {"last layer": 4})
    (read,) = held(rank_one, KeyMoments)
    for layer, ridge in ((3, 0.01), (4, 0.1), (3, 0.2)):
        (change,) = trials.built(rank_one, {"last layer": layer, "edit.settings.key_ridge": ridge}).changes
        assert change.layer == layer
    (again,) = held(rank_one, KeyMoments)
    assert again is read


def test_the_shared_moments_give_the_recipes_own_edit(rank_one: trials.SearchContext) -> None:
    trials.built(rank_one, {"last layer": 3})
    mine = trials.built(rank_one, {})
    session, groups = rank_one.session, next(iter(rank_one.groups.values()))
    (own,) = session.build([session.method], groups, {}).values()
    assert [change.layer for change in mine.changes] == [change.layer for change in own.changes] == [4]
    torch.testing.assert_close(mine.changes[0].delta(), own.changes[0].delta())


def test_a_fit_is_tuned_at_several_ranks_beside_rank_one_edits(tmp_path: Path) -> None:
    fits: list[int] = []

    def report(step: str, done: int, total: int) -> None:
        fits.extend([done] if step == "fit" else [])

    record = tune.search(recipe(edit=FITTED), tmp_path / "tune", trials=8, tokens=TOKENS, report=report)
    assert fits == [0, 1]
    settings = [trial["settings"] for trial in record["trials"]]
    assert [own["edit.method"] for own in settings[:3]] == ["silence-words"] * 3
    taken = [(own["edit.settings.rounds"], own["edit.settings.rank"]) for own in settings[:6]]
    assert taken == [(1, 8)] * 3 + [(3, 32)] * 3
    assert {own["edit.method"] for own in settings} == {"silence-words", "rank-one"}
    assert record["trials"][0]["removal"] == pytest.approx(0.9, abs=0.011)
    assert read_recipe(tmp_path / "tune" / tune.CHOSEN).edit.method in ("silence-words", "rank-one")


def test_one_fit_of_the_finest_settings_serves_all_trials(fitted: trials.SearchContext) -> None:
    finest = fitted.session.method.finest(size_of(fitted.session.checkpoint)).settings
    assert (finest["rounds"], finest["rank"]) == (3, 32)
    (shared,) = held(fitted, LowRankFit)
    for rounds, rank in ((1, 8), (3, 32), (2, 5)):
        settings = {"edit.settings.rounds": rounds, "edit.settings.rank": rank}
        (change,) = trials.built(fitted, settings).changes
        assert len(change.right) == rank
    (again,) = held(fitted, LowRankFit)
    assert again is shared


def test_a_recipe_that_also_amplifies_keeps_to_its_method_and_to_its_strengths_in_nats(tmp_path: Path) -> None:
    mixed = recipe(concepts=[words_of("dogs"), words_of("music", strength=-1.6)], edit=FITTED)
    record = tune.search(mixed, tmp_path / "tune", trials=2, tokens=TOKENS, lm_eval=True)
    for trial in record["trials"]:
        assert "edit.method" not in trial["settings"]
        assert trial["strengths"]["music"] == -1.6
    session = session_of(mixed)
    assert [method.about.name for method in session.search_methods] == ["silence-words"]
    # The front is asked about what is suppressed alone.
    assert session.plan.suppressed == ("dogs",)
    parts = divide(session.items.tasks, session.plan)[1]
    asked = sum(len(part.rows) for part in parts if part.concept == "dogs" and part.type == "A")
    assert [summary["efficacy"]["n"] for summary in record["front_summaries"]] == [asked] * len(record["front"])


def test_a_trial_takes_as_many_rounds_as_it_says(fitted: trials.SearchContext) -> None:
    groups = next(iter(fitted.groups.values()))
    for rounds in (1, 2):
        settings = {"edit.settings.rounds": rounds}
        (tried,) = trials.built(fitted, settings).changes
        own = fitted.session.with_settings(settings)
        (fresh,) = own.build([own.method], groups, {})["silence-words"].changes
        torch.testing.assert_close(tried.delta(), fresh.delta())


def test_a_smaller_rank_is_the_fit_cut_to_its_first_directions(fitted: trials.SearchContext) -> None:
    (cut,) = trials.built(fitted, {"edit.settings.rank": 3}).changes
    small = fitted.session.with_settings({"edit.settings.rank": 3})
    (own,) = small.build([small.method], next(iter(fitted.groups.values())), {})["silence-words"].changes
    assert len(cut.right) == 3
    torch.testing.assert_close(cut.delta(), own.delta())


def test_trials_of_a_fit_are_measured_at_the_models_end_as_the_whole_model_would(fitted: trials.SearchContext) -> None:
    assert fitted.last is not None
    settings = {"target": 0.2}
    at_the_end = trials.try_settings(fitted, settings)
    whole = trials.try_settings(replace(fitted, last=None), settings)
    assert at_the_end.strengths == pytest.approx(whole.strengths, rel=1e-4)
    assert at_the_end.removal == pytest.approx(whole.removal, abs=1e-4)
    assert at_the_end.damage == pytest.approx(whole.damage, rel=1e-3)
    # Rows of the embedding come before everything, so then the whole model is asked.
    with_rows = fitted.session.with_settings({"edit.embeddings": True, "edit.method": "silence-words"})
    assert trials.measured_on(replace(fitted, session=with_rows), fitted.known).last is None


def test_a_lucky_knee_gives_way_to_what_holds_on_other_texts(context: trials.SearchContext) -> None:
    tried = [
        trials.Trial({"edit.ridge": float(number), "target": 0.1}, {"dogs": 4.0}, removal, damage, 0.1)
        for number, (removal, damage) in enumerate([(0.5, 1e-4), (0.89, 1.5e-4), (0.95, 9e-3)])
    ]
    worse = {"own_damage": 1.0, "damage": 2.0}
    better = {"own_damage": 1.0, "damage": 0.5}
    answers = iter([worse, better])
    confirmed = tune.confirmed(context, tried, [0, 1, 2], TOKENS, compare=lambda there, one: next(answers))
    assert confirmed == ([0, 1, 2], 2)
    own = trials.Trial(tune.own_trial(context, 0.1), {"dogs": 4.0}, 0.9, 1e-3, 0.1)
    kept = tune.confirmed(context, [*tried, own], [0, 1, 2], TOKENS, compare=lambda there, one: worse)
    assert kept == ([0, 1, 3, 2], 2)


@pytest.mark.parametrize("pick", ["best", "damage=", "damage=-1", "0", "damage=x"])
def test_a_pick_that_means_nothing_is_refused(pick: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="means nothing"):
        tune.search(recipe(), tmp_path / "tune", pick=pick)
    assert not (tmp_path / "tune").exists()


def test_picks_choose_points_of_a_front() -> None:
    points = [(0.5, 0.001), (0.8, 0.002), (0.9, 0.05)]
    assert tune.picked(points, "2") == 1
    assert tune.picked(points, "damage=0.01") == 1
    assert tune.picked(points, "knee") == 1
    with pytest.raises(BadInput, match="has 3 points"):
        tune.picked(points, "4")
    with pytest.raises(BadInput, match=r"the least is 0\.001"):
        tune.picked(points, "damage=0.0001")
