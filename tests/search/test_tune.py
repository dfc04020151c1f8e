"""The search on the demo model: small, resumable, interrupted; every promise about its folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rotate_edit.edits import build as making
from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import edits_of
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.demo.world import concepts
from rotate_edit.recipe import Recipe, parse_recipe, read_recipe
from rotate_edit.search import trials, tune
from rotate_edit.session import open_recipe

TOKENS = 512


def recipe(**changes: Any) -> Recipe:
    dogs = {"name": "dogs", "words": list(concepts()["dogs"].words), "plurals": True}
    small = {
        "model": "demo",
        "concepts": [dogs],
        "locate": {"group_distance": 2.0, "candidates": 120},
        "decompose": {"channels": 1},
        "edit": {"method": "channel-located"},
        "evaluate": {"items": "demo"},
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
def prepared() -> trials.Prepared:
    return trials.prepare(open_recipe(recipe()), tokens=TOKENS)


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
    folder: Path, record: dict[str, Any], prepared: trials.Prepared
) -> None:
    found = read_recipe(folder / tune.CHOSEN)
    chosen = record["trials"][record["front"][record["chosen"]]]
    assert found.concepts[0].strength == round(chosen["strengths"]["dogs"], 4)
    assert found.select.share == pytest.approx(chosen["settings"]["select.share"])
    again = trials.try_settings(prepared, chosen["settings"])
    assert again.removal == pytest.approx(chosen["removal"], abs=1e-4)
    assert again.damage == pytest.approx(chosen["damage"], rel=1e-3)
    assert (folder / tune.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_search_goes_on_where_it_was(folder: Path, record: dict[str, Any]) -> None:
    with mock.patch.object(tune, "try_settings", wraps=tune.try_settings) as tried:
        more = tune.search(recipe(), folder, trials=6, tokens=TOKENS)
    assert tried.call_count == 1
    assert more["trials"][: len(record["trials"])] == record["trials"]


def test_picking_anew_tries_nothing_and_the_front_can_be_asked(folder: Path, record: dict[str, Any]) -> None:
    done = len(json.loads((folder / tune.RECORD).read_text())["trials"])
    limited = recipe(evaluate={"items": "demo", "limit": 6})
    with mock.patch.object(tune, "_own_folder"):
        again = tune.search(limited, folder, trials=2, tokens=TOKENS, pick="1", lm_eval=True)
    assert len(again["trials"]) == done
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
    real, calls = trials.try_settings, []

    def interrupted(*arguments: Any) -> trials.Tried:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with mock.patch.object(tune, "try_settings", interrupted):
        record = tune.search(recipe(), tmp_path / "tune", trials=50, tokens=TOKENS)
    assert record["interrupted"]
    assert len(record["trials"]) == 2
    assert (tmp_path / "tune" / tune.CHOSEN).is_file()


def test_nothing_found_is_a_failure_and_no_texts_bad_input(tmp_path: Path, prepared: trials.Prepared) -> None:
    with pytest.raises(Failure, match=r"found no neuron to change|no neuron is left"):
        trials.try_settings(prepared, {"select.support": 99.0, "target": 0.1})
    with pytest.raises(BadInput, match="nothing to search but the strength"):
        tune.search(recipe(edit={"method": "token-logits"}), tmp_path / "none", trials=1)
    with pytest.raises(BadInput, match="tune needs texts"):
        tune.search(recipe(concepts=[{"name": "dogs", "words": ["dog"], "strength": 2}], evaluate={}), tmp_path / "t")


def test_the_model_is_left_as_it_was_and_a_trial_writes_nothing(prepared: trials.Prepared, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    trials.try_settings(prepared, {"select.share": 0.3, "target": 0.2})
    assert all(torch.equal(before[name], tensor) for name, tensor in prepared.model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_layers_and_matrices_limit_the_edit(prepared: trials.Prepared) -> None:
    edit = trials.built(prepared, {"locate.layers": [2, 3], "select.share": 0.2})
    assert {change.layer for change in edit.changes} <= {2, 3}
    assert len(edit.changes) < len(trials.built(prepared, {"select.share": 0.2}).changes)


def test_an_amplified_concept_is_raised(prepared: trials.Prepared) -> None:
    edit = trials.built(prepared, {})
    removal, damage = trials.effect(prepared, trials.at_strengths(edit, {"dogs": -2.0}), {"dogs": -2.0})
    assert 0 < removal < 1
    assert damage > 0
    with applied(prepared.model, edit, -2.0):
        pass


@pytest.mark.parametrize("target", [0.5, 0.1, 0.02])
def test_the_secant_finds_strengths_of_bent_curves(target: float) -> None:
    def curve(strength: float) -> float:
        return math.exp(-0.1 * strength - 0.02 * strength**2)

    assert curve(trials.secant_strength(curve, target)) == pytest.approx(target, rel=0.1)


def test_the_recipe_against_itself_costs_the_same(prepared: trials.Prepared) -> None:
    own = trials.try_settings(prepared, {"target": 0.15})
    found = trials.compared(prepared, own)
    assert found["removal"] == pytest.approx(own.removal, abs=1e-6)
    # Interpolated between two strengths, fifteen per cent to either side.
    assert found["own_damage"] == pytest.approx(found["damage"], rel=0.03)


@pytest.mark.parametrize(
    "changes", [{"method": "keyed", "direction": "plain"}, {"method": "channel-located", "direction": "plain"}]
)
def test_the_recipes_own_settings_are_among_those_tried_and_known_again(
    changes: dict[str, Any], prepared: trials.Prepared
) -> None:
    own = recipe(edit=changes, locate={"matrices": ["gate", "out"]})
    here = replace(prepared, opened=replace(prepared.opened, recipe=own))
    settings = tune.own_trial(here, 0.1)
    assert settings["edit.direction"] == "plain"
    assert settings["locate.matrices"] == ["gate", "out"]
    tried = trials.Tried(settings, {}, 0.9, 0.1, 0.1)
    assert tune._is_own(here, tried)
    assert not tune._is_own(here, replace(tried, settings=settings | {"edit.ridge": 7.0}))


def test_a_keyed_recipe_is_tuned_on_shared_moments(tmp_path: Path) -> None:
    keyed = recipe(edit={"method": "keyed", "key_tokens": 2000})
    with mock.patch.object(trials, "key_moments", wraps=trials.key_moments) as read:
        record = tune.search(keyed, tmp_path / "tune", trials=4, tokens=TOKENS)
    assert read.call_count == 1
    assert record["trials"][0]["settings"]["edit.key_ridge"] == keyed.edit.key_ridge
    assert record["trials"][0]["removal"] == pytest.approx(0.9, abs=0.011)
    assert {max(trial["settings"]["locate.layers"]) for trial in record["trials"]} <= {3, 4}
    found = read_recipe(tmp_path / "tune" / tune.CHOSEN)
    assert found.edit.method == "keyed"


def test_a_fitted_recipe_is_tuned_with_one_fit_at_several_ranks_beside_keyed_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    fitted = recipe(edit={"method": "fitted", "key_tokens": 2000, "fit_rank": 8})
    with mock.patch("rotate_edit.edits.build.fit_change", wraps=making.fit_change) as fit:
        record = tune.search(fitted, tmp_path / "tune", trials=8, tokens=TOKENS)
    assert fit.call_count == 1
    settings = [trial["settings"] for trial in record["trials"]]
    assert [own["edit.method"] for own in settings[:3]] == ["fitted"] * 3
    assert [(own["edit.fit_rounds"], own["edit.fit_rank"]) for own in settings[:6]] == [(1, 8)] * 3 + [(3, 32)] * 3
    assert fit.call_args.kwargs["rounds"] == 3
    assert fit.call_args.kwargs["rank"] == 32
    assert {own["edit.method"] for own in settings} == {"fitted", "keyed"}
    assert record["trials"][0]["removal"] == pytest.approx(0.9, abs=0.011)
    assert read_recipe(tmp_path / "tune" / tune.CHOSEN).edit.method in ("fitted", "keyed")


def test_a_recipe_that_also_amplifies_keeps_to_fits_and_to_its_strengths_in_nats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    dogs, music = ({"name": name, "words": list(concepts()[name].words), "plurals": True} for name in ("dogs", "music"))
    mixed = recipe(concepts=[dogs, music | {"strength": -1.6}], edit={"method": "fitted", "key_tokens": 2000})
    record = tune.search(mixed, tmp_path / "tune", trials=8, tokens=TOKENS)
    for trial in record["trials"]:
        assert trial["settings"]["edit.method"] == "fitted"
        assert trial["strengths"]["music"] == -1.6
    with mock.patch.object(tune, "evaluate") as ask:
        tune.asked_front(mock.Mock(opened=mock.Mock(recipe=mixed)), {"front": [], "trials": []}, tune.silent)
    assert ask.call_args.args[3].lowered == ("dogs",)


def test_a_trial_takes_as_many_rounds_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    opened = open_recipe(recipe(edit={"method": "fitted", "key_tokens": 2000, "fit_rank": 8}))
    shared = trials.prepare(opened, tokens=TOKENS)
    located = next(iter(shared.found.values()))
    for rounds in (1, 2):
        settings = {"edit.fit_rounds": rounds}
        (tried,) = trials.built(shared, settings).changes
        chosen = replace(opened, recipe=trials.with_settings(opened.recipe, settings))
        (own,) = edits_of(chosen, located, ["fitted"], shared.model)["fitted"].changes
        torch.testing.assert_close(tried.delta(), own.delta())


def test_a_smaller_rank_is_the_fit_cut_to_its_first_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    opened = open_recipe(recipe(edit={"method": "fitted", "key_tokens": 2000, "fit_rank": 8}))
    shared = trials.prepare(opened, tokens=TOKENS)
    (cut,) = trials.built(shared, {"edit.fit_rank": 3}).changes
    small = trials.with_settings(opened.recipe, {"edit.fit_rank": 3})
    (own,) = edits_of(replace(opened, recipe=small), next(iter(shared.found.values())), ["fitted"], shared.model)[
        "fitted"
    ].changes
    torch.testing.assert_close(cut.delta(), own.delta())


def test_a_fitted_recipes_trials_are_measured_at_the_models_end_as_the_whole_model_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    opened = open_recipe(recipe(edit={"method": "fitted", "key_tokens": 2000, "fit_rank": 8}))
    shared = trials.prepare(opened, tokens=TOKENS)
    assert shared.ends is not None
    settings = {"target": 0.2}
    at_the_end = trials.try_settings(shared, settings)
    whole = trials.try_settings(replace(shared, ends=None), settings)
    assert at_the_end.strengths == pytest.approx(whole.strengths, rel=1e-4)
    assert at_the_end.removal == pytest.approx(whole.removal, abs=1e-4)
    assert at_the_end.damage == pytest.approx(whole.damage, rel=1e-3)
    # Rows of the embedding come before everything, so then the whole model is asked.
    with_rows = recipe(edit={"method": "fitted", "key_tokens": 2000, "fit_rank": 8, "embeddings": True})
    assert trials.prepare(open_recipe(with_rows), tokens=TOKENS).ends is None


def test_the_shared_moments_give_the_recipes_own_edit() -> None:
    opened = open_recipe(recipe(edit={"method": "keyed", "key_tokens": 2000}))
    shared = trials.prepare(opened, tokens=TOKENS)
    mine = trials.built(shared, {})
    (own,) = edits_of(opened, next(iter(shared.found.values())), ["keyed"], shared.model).values()
    assert [change.layer for change in mine.changes] == [change.layer for change in own.changes] == [4]
    torch.testing.assert_close(mine.changes[0].delta(), own.changes[0].delta())


def test_a_lucky_knee_gives_way_to_what_holds_on_other_texts(prepared: trials.Prepared) -> None:
    tried = [
        trials.Tried({"edit.ridge": float(number), "target": 0.1}, {"dogs": 4.0}, removal, damage, 0.1)
        for number, (removal, damage) in enumerate([(0.5, 1e-4), (0.89, 1.5e-4), (0.95, 9e-3)])
    ]
    worse = {"own_damage": 1.0, "damage": 2.0}
    better = {"own_damage": 1.0, "damage": 0.5}
    with mock.patch.object(tune, "compared", side_effect=[worse, better]):
        assert tune.confirmed(prepared, tried, [0, 1, 2], TOKENS) == ([0, 1, 2], 2)
    own = trials.Tried(tune.own_trial(prepared, 0.1), {"dogs": 4.0}, 0.9, 1e-3, 0.1)
    with mock.patch.object(tune, "compared", return_value=worse):
        assert tune.confirmed(prepared, [*tried, own], [0, 1, 2], TOKENS) == ([0, 1, 3, 2], 2)


def test_a_flat_curve_has_no_strength() -> None:
    with pytest.raises(Failure, match="no strength up to 64"):
        trials.secant_strength(lambda strength: 1.0, 0.1)


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
